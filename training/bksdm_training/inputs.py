"""A checkpoint where it is used, frozen: what its encoders make of a batch, and what it draws."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TypeVar, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import IntTensor, Tensor, nn
from transformers import CLIPTextModel

from bksdm.checkpoint import Checkpoint
from bksdm.sampling import sample
from bksdm_training.examples import Batch
from bksdm_training.vae import encode_pixels

Module = TypeVar("Module", bound=nn.Module)


def frozen(module: Module, device: torch.device, dtype: torch.dtype = torch.float32) -> Module:
    """The module where it is used; itself on a CPU, elsewhere a copy: the original is still saved and drawn with."""
    placed = module if device.type == "cpu" and dtype == torch.float32 else copy.deepcopy(module)
    # nn.Module's own: diffusers' warns of nothing that happens here
    return cast(Module, nn.Module.to(placed, device=device, dtype=dtype).eval().requires_grad_(False))


def placed(whole: Checkpoint, device: torch.device) -> Checkpoint:
    """The whole model frozen on a device, to draw with."""
    return replace(
        whole,
        unet=frozen(whole.unet, device),
        text_encoder=frozen(whole.text_encoder, device),
        vae=frozen(whole.vae, device),
    )


def draw(whole: Checkpoint, prompts: Sequence[str], size: int, *, seeds: Sequence[int], steps: int = 25) -> Tensor:
    """Pictures as bksdm.sampling.sample gives them, of a model that lies where it is used; on a GPU in fp16."""
    device = whole.unet.device
    with torch.autocast("cuda", torch.float16) if device.type == "cuda" else nullcontext():
        return sample(
            whole.unet,
            whole.text_encoder,
            whole.vae,
            whole.tokenizer,
            whole.scheduler_config,
            prompts,
            guidance=whole.guidance_scale,
            seeds=seeds,
            size=size,
            steps=steps,
        )


class Inputs:
    """From a batch to what the U-Nets are given, with the teacher's frozen encoders, in float32 and without gradients.

    Called with a Batch; returns noisy latents [B, 4, h, w], timesteps [B], context [B, 77, D] and the target [B, 4, h,
    w]: the noise, or the velocity where the teacher predicts that."""

    def __init__(self, teacher: Checkpoint, device: torch.device) -> None:
        self.device, self.teacher = device, teacher
        self.scheduler = cast(DDPMScheduler, DDPMScheduler.from_config(teacher.scheduler_config))
        self.scale = float(teacher.vae.config["scaling_factor"])

    # At their first use: a cache needs neither, nor their memory.
    @cached_property
    def _vae(self) -> AutoencoderKL:
        return frozen(self.teacher.vae, self.device)

    @cached_property
    def _text_encoder(self) -> CLIPTextModel:
        return frozen(self.teacher.text_encoder, self.device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        noisy, timesteps, target = self.noised(batch)
        return noisy, timesteps, self.context(batch), target

    @torch.no_grad()
    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and target alone: for a text encoder that is trained along."""
        with torch.autocast(self.device.type, enabled=False):
            mean, std = self._moments(batch).chunk(2, 1)
            latents = (mean + std * self._on(batch.latent_noise)) * self.scale
            noise, timesteps = self._on(batch.noise), cast(IntTensor, self._on(batch.timesteps))
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            if self.scheduler.config["prediction_type"] == "v_prediction":
                return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)
            return noisy, timesteps, noise

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """The text embeddings [B, 77, D]."""
        if batch.context is not None:
            return self._on(batch.context).float()
        if batch.ids is None:
            raise ValueError("a batch holds ids or context")
        with torch.autocast(self.device.type, enabled=False):
            return self._text_encoder(self._on(batch.ids)).last_hidden_state

    def _moments(self, batch: Batch) -> Tensor:
        if batch.moments is not None:
            return self._on(batch.moments).float()
        if batch.pixels is None:
            raise ValueError("a batch holds pixels or moments")
        # A few at a time: at 512 px one activation of 64 pictures is 8.6 GB.
        return torch.cat([encode_pixels(self._vae, part) for part in self._on(batch.pixels).split(8)])

    def _on(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
