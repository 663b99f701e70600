"""Stage 1 of the demo teacher: a small AutoencoderKL (L1 + LPIPS + KL, as Stable Diffusion's, without a critic)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from bksdm.perceptual import Lpips
from bksdm.sampling import decode
from bksdm_training import checkpointing, loop
from bksdm_training.charts import save_grid
from bksdm_training.config import TeacherConfig
from bksdm_training.data import Order, Pictures, seeded, to_model_range


def build_vae(config: TeacherConfig) -> AutoencoderKL:
    """An untrained autoencoder: factor 8, 4 latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        # diffusers annotates its tuples as of one element
        block_out_channels=config.vae_channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=config.vae_layers,
        norm_num_groups=config.vae_groups,
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        sample_size=config.size,
    )


def encode(vae: AutoencoderKL, x: Tensor) -> DiagonalGaussianDistribution:
    """Pictures [B, 3, H, W] in [-1, 1] -> the distribution of their latents [B, 4, H / 8, W / 8], unscaled."""
    return cast(DiagonalGaussianDistribution, vae.encode(x, return_dict=False)[0])


def move(vae: AutoencoderKL, device: torch.device) -> AutoencoderKL:
    """`vae.to(device)`, whose annotations diffusers' decorators hide."""
    return cast(AutoencoderKL, nn.Module.to(vae, device))


def train_vae(pictures: Pictures, config: TeacherConfig, folder: Path, accelerator: Accelerator) -> AutoencoderKL:
    """Train (or go on training) the autoencoder; its scaling factor is set to 1 / std of the latents it gives."""
    torch.manual_seed(config.vae.seed)
    device = accelerator.device
    vae = build_vae(config).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # At its first use: a finished autoencoder is only loaded, and LPIPS comes from a package registry.
    lpips = cache(lambda: Lpips().to(device))
    whole_from = config.vae.steps * (1 - config.whole_share)
    # Whole pictures are (size / crop)^2 times the work: fewer of them a step.
    whole_batch = max(1, config.vae.batch_size * config.crop**2 // config.size**2)
    order = Order(len(pictures), config.vae.batch_size, config.vae.seed)

    def loss_at(_model: nn.Module, step: int, _part: int) -> dict[str, Tensor]:
        generator = seeded(config.vae.seed, step)
        pixels = pictures.pixels[order.batch(step)]
        pixels = random_crop(pixels, config.crop, generator) if step <= whole_from else pixels[:whole_batch]
        x = to_model_range(pixels).to(device, memory_format=torch.channels_last)
        latent = encode(vae, x)
        noise = torch.randn(latent.mean.shape, generator=generator).to(device)
        rebuilt = decode(vae, latent.mean + latent.std * noise)
        return {
            "l1": (rebuilt - x).abs().mean(),
            "lpips": config.lpips_weight * lpips()(rebuilt, x).mean(),
            "kl": config.kl_weight * 0.5 * (latent.mean.square() + latent.var - 1 - latent.logvar).float().mean(),
        }

    shown = to_model_range(pictures.pixels[:: max(1, len(pictures) // 8)][:8])

    def on_saved(_step: int, average: Mapping[str, Tensor], _state: Path) -> None:
        with torch.no_grad(), checkpointing.swapped(vae, average):
            rebuilt = decode(vae, encode(vae, shown.to(device)).mode()).cpu()
        save_grid(torch.cat([shown, rebuilt]), folder / "samples.png", columns=len(shown))

    loop.run(
        "vae",
        vae,
        loss_at,
        config.vae,
        folder,
        accelerator=accelerator,
        on_saved=on_saved,
        pictures_at=lambda step: config.vae.batch_size if step <= whole_from else whole_batch,
    )
    moments = encode_moments(vae, pictures, device)
    vae.register_to_config(scaling_factor=round(1 / moments[:, :4].std().item(), 5))
    return vae


def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> mean and standard deviation of the latents, unscaled: [B, 8, S / 8, S / 8]."""
    latent = encode(vae, to_model_range(pixels))
    return torch.cat([latent.mean, latent.std], 1)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pictures: Pictures, device: torch.device, batch_size: int = 16) -> Tensor:
    """Mean and standard deviation of every picture's latents, unscaled: [N, 8, size / 8, size / 8] float32."""
    out = []
    for pixels in pictures.pixels.split(batch_size):
        out.append(encode_pixels(vae, pixels.to(device)).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Pictures, device: torch.device, batch_size: int = 16) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of encode-decode, in dB (peak 2: values in [-1, 1])."""
    out = []
    for pixels in pictures.pixels.split(batch_size):
        x = to_model_range(pixels).to(device)
        rebuilt = decode(vae, encode(vae, x).mode()).clamp(-1, 1)
        out.append(10 * torch.log10(4 / (rebuilt - x).square().mean((1, 2, 3))))
    return torch.cat(out).mean().item()


def random_crop(pixels: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """A square crop of every picture at its own place: [B, 3, S, S] -> [B, 3, crop, crop]."""
    room = pixels.shape[-1] - crop + 1
    places = torch.randint(0, room, (len(pixels), 2), generator=generator).tolist()
    return torch.stack([p[:, y : y + crop, x : x + crop] for p, (y, x) in zip(pixels, places, strict=True)])
