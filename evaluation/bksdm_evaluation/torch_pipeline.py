"""Pictures of many captions from a checkpoint in torch: students in training are scored without an export.

The same seed gives the picture that the exported bundle gives through bksdm_runtime, but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bksdm.checkpoint import Checkpoint
from bksdm.components import vae_scale
from bksdm.sampling import decode, denoise, embed, initial_noise
from bksdm_evaluation.retrieval import ScoreError
from bksdm_runtime.image import to_uint8


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    captions: Sequence[str],
    *,
    on_step: Callable[[float], object],
    steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Image.Image]:
    """RGB pictures of the captions at the checkpoint's own size, in order; picture i has seed `seed + i`.

    Sampled with PNDM (PLMS) under the checkpoint's noise schedule, on the device of its U-Net; noise is drawn on the
    CPU. guidance_scale: None for the checkpoint's own; up to 1 the U-Net is evaluated once per picture.
    on_step is told what share of its pictures each U-Net evaluation made; in all that is their number.
    Raises ScoreError when the latents or the pictures are not finite."""
    guidance = checkpoint.guidance_scale if guidance_scale is None else guidance_scale
    side = latent_size(checkpoint)
    shape = (int(checkpoint.unet.config["in_channels"]), side, side)
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), batch_size):
        chosen = captions[start : start + batch_size]
        noise = initial_noise(shape, range(seed + start, seed + start + len(chosen)))
        drawn = draw(checkpoint, chosen, noise, steps=steps, guidance=guidance, on_step=on_step)
        pictures += [Image.fromarray(pixels) for pixels in drawn]
    return pictures


@torch.no_grad()
def draw(
    checkpoint: Checkpoint,
    captions: Sequence[str],
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    on_step: Callable[[float], object],
) -> list[NDArray[np.uint8]]:
    """Pictures [H, W, 3] of the captions in one batch, from noise [B, C, h, w]; the rest as `generate` has it."""
    blank = [_context(checkpoint, "")] if guidance > 1 else []
    # One at a time, as the runtime encodes: a caption's context must not depend on its company.
    contexts = [_context(checkpoint, caption) for caption in captions]
    context = torch.cat(blank * len(captions) + contexts)  # [2B, 77, D], or [B, 77, D] unguided
    latents = denoise(
        checkpoint.unet,
        noise.to(checkpoint.unet.device),
        context,
        checkpoint.scheduler_config,
        guidance=guidance,
        steps=steps,
        on_step=on_step,
    )
    if not latents.isfinite().all():
        raise ScoreError(f"the U-Net of {checkpoint.source} gives NaN or infinity: there is no picture to score")
    return [_decode(checkpoint, one) for one in latents.split(1)]


def latent_size(checkpoint: Checkpoint) -> int:
    """Height and width of the latents at the checkpoint's own picture size."""
    return checkpoint.image_size // vae_scale(checkpoint.vae)


def _context(checkpoint: Checkpoint, text: str) -> Tensor:
    return embed(checkpoint.text_encoder, checkpoint.tokenizer, [text]).to(checkpoint.unet.device)  # [1, 77, D]


def _decode(checkpoint: Checkpoint, latents: Tensor) -> NDArray[np.uint8]:
    """One picture [H, W, 3] from [1, C, h, w], as the runtime decodes: alone, and rounded as it rounds."""
    vae = checkpoint.vae
    unscaled = (latents / vae.config["scaling_factor"]).to(vae.device)
    decoded = decode(vae, unscaled).cpu().numpy()
    if not np.isfinite(decoded).all():
        raise ScoreError(f"the VAE of {checkpoint.source} gives NaN or infinity: there is no picture to score")
    return to_uint8(decoded)[0]
