"""Pictures from the torch modules of a model: what training looks at and evaluation scores, without an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import FloatTensor, Tensor
from transformers import CLIPTextModel, CLIPTokenizer


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
    scheduler = cast(PNDMScheduler, PNDMScheduler.from_config(dict(scheduler_config)))
    scheduler.set_timesteps(steps)
    side = size // 2 ** (len(vae.config["block_out_channels"]) - 1)
    noise = [torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.cat(noise).to(unet.device) * scheduler.init_noise_sigma
    context = embed(text_encoder, tokenizer, [""] * len(prompts) + list(prompts))
    for timestep in cast(Tensor, scheduler.timesteps):
        eps = unet(torch.cat([latents] * 2), timestep, context, return_dict=False)[0].float()
        blank, caption = eps.chunk(2)
        guided = blank + guidance * (caption - blank)
        latents = scheduler.step(guided, cast(int, timestep), latents, return_dict=False)[0]
    with torch.autocast(latents.device.type, enabled=False):
        return decode(vae, latents / vae.config["scaling_factor"]).cpu().clamp(-1, 1)


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


def batches(count: int, size: int) -> Iterator[slice]:
    """`count` things in slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
