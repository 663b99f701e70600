"""Pictures from the torch modules of a model: what training looks at and evaluation scores, without an export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import FloatTensor, Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from bksdm.components import vae_scale


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    scheduler_config: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    guidance: float,
    seeds: Sequence[int],
    size: int,
    steps: int = 25,
) -> Tensor:
    """Pictures [N, 3, size, size] of the prompts, float32 in [-1, 1], on the CPU; PNDM, classifier-free guidance.

    All modules on one device. Picture i starts from torch's CPU noise of seeds[i], as the runtime draws it."""
    side = size // vae_scale(vae)
    noise = initial_noise((int(unet.config["in_channels"]), side, side), seeds).to(unet.device)
    context = embed(text_encoder, tokenizer, [""] * (len(prompts) if guidance > 1 else 0) + list(prompts))
    latents = denoise(unet, noise, context, scheduler_config, guidance=guidance, steps=steps)
    with torch.autocast(latents.device.type, enabled=False):
        return decode(vae, latents / vae.config["scaling_factor"]).cpu().clamp(-1, 1)


@torch.no_grad()
def denoise(
    unet: UNet2DConditionModel,
    noise: Tensor,
    context: Tensor,
    scheduler_config: Mapping[str, Any],
    *,
    guidance: float,
    steps: int,
    on_step: Callable[[float], object] = lambda share: None,
) -> Tensor:
    """Clean latents [B, C, h, w] from noise of unit variance. Classifier-free guidance, arXiv 2207.12598.

    context: [2B, 77, D], the empty captions first; [B, 77, D] where guidance is 1 or less, which evaluates the U-Net
    once per picture. on_step is told what share of its pictures each evaluation made; in all that is their number."""
    # The runtime's pndm is PLMS alone; diffusers would warm up with Runge-Kutta where a scheduler does not say.
    scheduler = cast(PNDMScheduler, PNDMScheduler.from_config(dict(scheduler_config), skip_prk_steps=True))
    scheduler.set_timesteps(steps)
    timesteps = cast(Tensor, scheduler.timesteps)
    latents = noise * scheduler.init_noise_sigma
    for timestep in timesteps:
        if guidance > 1:
            output = unet(torch.cat([latents] * 2), timestep, context, return_dict=False)[0].float()
            blank, caption = output.chunk(2)
            output = blank + guidance * (caption - blank)
        else:
            output = unet(latents, timestep, context, return_dict=False)[0].float()
        latents = cast(Tensor, scheduler.step(output, cast(int, timestep), latents, return_dict=False)[0])
        on_step(len(latents) / len(timesteps))
    return latents


def initial_noise(shape: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """torch's CPU noise [B, *shape] float32; row i of seeds[i], a generator of its own."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def embed(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Text embeddings [N, 77, D] on the text encoder's device."""
    return text_encoder(token_ids(tokenizer, texts).to(text_encoder.device)).last_hidden_state


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids [N, 77] int64."""
    out = tokenizer(list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return cast(Tensor, out["input_ids"])


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Unscaled latents [B, 4, h, w] -> pictures [B, 3, 8 h, 8 w] float32, about [-1, 1]."""
    return cast(Tensor, vae.decode(cast(FloatTensor, latents), return_dict=False)[0]).float()
