"""Stage 2 of the demo teacher: a narrow SD v1 U-Net and its CLIP-shaped text encoder, trained together from scratch.

The autoencoder is frozen and its moments are computed once; latents are sampled anew each step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bksdm.checkpoint import Checkpoint
from bksdm.digests import digest
from bksdm.sampling import sample
from bksdm_training import checkpointing, loop
from bksdm_training.charts import save_grid
from bksdm_training.checkpointing import restore_module
from bksdm_training.config import TeacherConfig
from bksdm_training.data import Order, Pictures, seeded, tokenize
from bksdm_training.records import ResumeError
from bksdm_training.vae import encode_moments

log = logging.getLogger(__name__)

# Stable Diffusion v1's noise schedule and sampler settings
SCHEDULER_CONFIG: dict[str, object] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,  # PNDM does not read it, DDIM made from this configuration does
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class Denoiser(nn.Module):
    """Text encoder and U-Net as one trainable module."""

    def __init__(self, config: TeacherConfig, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
                projection_dim=config.text_width,
                bos_token_id=cast(int, tokenizer.bos_token_id),
                eos_token_id=cast(int, tokenizer.eos_token_id),
                pad_token_id=cast(int, tokenizer.pad_token_id),
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=config.size // 8,
            in_channels=4,
            out_channels=4,
            block_out_channels=config.unet_channels,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=config.text_width,
            # diffusers' name for what is a number of heads, kept for checkpoints: see SD v1.4's own config
            attention_head_dim=config.unet_heads,
            norm_num_groups=config.unet_groups,
        )

    def context(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> text embedding [B, 77, D]."""
        return self.text_encoder(ids).last_hidden_state

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise [B, 4, h, w]."""
        return self.unet(noisy, timesteps, self.context(ids)).sample


def train_denoiser(
    pictures: Pictures,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    config: TeacherConfig,
    folder: Path,
    accelerator: Accelerator,
    shown: Sequence[str],
    begin: Checkpoint | None = None,
) -> Denoiser:
    """Train (or go on training) the denoiser; `shown` are the captions of the sample grid at every checkpoint.

    begin: weights to start from instead of random ones; see `take_over` for a U-Net of other widths. Raises ResumeError
    when they are of another shape."""
    torch.manual_seed(config.unet.seed)
    device = accelerator.device
    model = Denoiser(config, tokenizer).to(device)
    if begin is not None:
        restore_module(model.text_encoder, begin.text_encoder.state_dict())
        take_over(model.unet, begin.unet.state_dict())
    mean, std = (encode_moments(vae, pictures, device) * vae.config["scaling_factor"]).chunk(2, 1)
    tokens = tokenize(tokenizer, pictures.captions)
    order = Order(len(pictures), config.unet.batch_size, config.unet.seed)
    made_on = "autoencoder " + digest(vae.state_dict())  # another one's latents would be noise to these weights
    alphas = cast(DDPMScheduler, DDPMScheduler.from_config(SCHEDULER_CONFIG)).alphas_cumprod
    weights = loss_weights(alphas, config.snr_gamma)

    def loss_at(called: nn.Module, step: int, _part: int) -> dict[str, Tensor]:
        generator = seeded(config.unet.seed, step)
        rows = order.batch(step)
        ids = tokens.draw(rows, config.caption_dropout, generator)
        latents = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, len(alphas), (len(rows),), generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        eps = called(noisy.to(device), timesteps.to(device), ids.to(device))
        error = (eps.float() - noise.to(device)).square().mean((1, 2, 3))
        return {"weighted_noise_mse": (error * weights[timesteps].to(device)).mean()}

    def on_saved(_step: int, average: Mapping[str, Tensor], _state: Path) -> None:
        with checkpointing.swapped(model, average):
            pictures = draw(model, vae, tokenizer, shown, config.guidance_scale)
        save_grid(pictures, folder / "samples.png", columns=8, captions=shown)

    loop.run(
        "unet",
        model,
        loss_at,
        config.unet,
        folder,
        accelerator=accelerator,
        on_saved=on_saved,
        made_on=made_on,
        rates={"token_embedding.weight": config.embedding_rate},
    )
    silence_unseen_tokens(model.text_encoder, tokens.ids)
    return model


def take_over(unet: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Start a U-Net from one of other widths: every tensor of the same name and shape is copied, the rest stay as they
    were drawn; returns how many were copied. Raises ResumeError when that is not even half of them."""
    own = unet.state_dict()
    same = {name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape}
    if 2 * len(same) < len(own):
        raise ResumeError(
            f"only {len(same)} of the U-Net's {len(own)} tensors have the shapes of the weights to start from: "
            "start from a model of nearly the same widths, or without one"
        )
    if len(same) < len(own):
        log.warning("%d of the U-Net's %d tensors start from the weights given, the rest anew", len(same), len(own))
    restore_module(unet, {name: weights[name] if name in same else tensor for name, tensor in own.items()})
    return len(same)


def loss_weights(alphas_cumprod: Tensor, gamma: float, *, velocity: bool = False) -> Tensor:
    """Loss weight of each timestep: min(SNR + 1, gamma) / SNR for noise, over SNR + 1 for velocity: [T].

    On the predicted picture both are min(SNR + 1, gamma): SNR + 1 as in progressive distillation (arXiv 2202.00512,
    equation 10), bounded as in min-SNR (arXiv 2303.09556). Unweighted noise prediction weighs the picture's error by
    SNR alone, next to nothing where the noise is high and the caption decides what is drawn."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (snr + 1).clamp(max=gamma) / (snr + 1 if velocity else snr)


@torch.no_grad()
def silence_unseen_tokens(text_encoder: CLIPTextModel, seen: Tensor) -> None:
    """Set the embedding of every token that training never showed to zero.

    They still hold their random initial values (decayed), so an unknown word would act as noise; as zero it adds
    nothing but its position."""
    embedding = cast(nn.Embedding, text_encoder.get_input_embeddings()).weight
    keep = torch.zeros(len(embedding), dtype=torch.bool)
    keep[seen.unique()] = True
    embedding[~keep] = 0


def draw(
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, captions: Sequence[str], guidance: float
) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] of the captions, on the CPU; picture i starts from noise of seed i."""
    return sample(
        model.unet,
        model.text_encoder,
        vae,
        tokenizer,
        SCHEDULER_CONFIG,
        captions,
        guidance=guidance,
        seeds=range(len(captions)),
        size=int(model.unet.config["sample_size"]) * 8,
    )
