"""What draws pictures to score: a bundle on any backend, or a checkpoint in torch, from noise that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bksdm import digests
from bksdm.checkpoint import Checkpoint
from bksdm_evaluation import torch_pipeline
from bksdm_runtime.pipeline import Images, Pipeline, Step
from bksdm_runtime.request import Request

Pixels = NDArray[np.uint8]
Noise = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn. batch_size: captions at once, which share U-Net evaluations."""

    steps: int
    guidance_scale: float
    sampler: str = "pndm"
    batch_size: int = 8


class Artist(Protocol):
    """Draws at the model's own size. latent_shape: [C, h, w] of the noise it takes."""

    latent_shape: tuple[int, int, int]
    guidance_scale: float

    def draw(
        self, captions: Sequence[str], noise: Sequence[Noise], settings: Settings, on_step: Callable[[float], object]
    ) -> Iterator[Pixels]:
        """Pictures [H, W, 3] of the captions, in order, each from its own noise.

        on_step is told what share of its pictures each U-Net evaluation made; in all that is their number."""
        ...

    def identity(self) -> dict[str, object]:
        """Which model this is and what computes it, for JSON: what equals it draws the same."""
        ...


class BundleArtist:
    """A bundle through the runtime. Its `draw` raises what Pipeline.generate raises."""

    def __init__(self, pipeline: Pipeline) -> None:
        model = pipeline.bundle.manifest.model
        factor = model.vae_scale_factor
        self._pipeline = pipeline
        self.latent_shape = (model.latent_channels, model.height // factor, model.width // factor)
        self.guidance_scale = model.guidance_scale

    def draw(
        self, captions: Sequence[str], noise: Sequence[Noise], settings: Settings, on_step: Callable[[float], object]
    ) -> Iterator[Pixels]:
        requests = [
            Request(
                caption,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                sampler=settings.sampler,
                latents=own,
            )
            for caption, own in zip(captions, noise, strict=True)
        ]
        # All agree in what a batch shares, so that batches and pictures come in the order of the captions.
        for event in self._pipeline.generate(requests, batch_size=settings.batch_size):
            match event:
                case Step(positions=positions, total=total):
                    on_step(len(positions) / total)
                case Images(pixels=pixels):
                    yield from pixels

    def identity(self) -> dict[str, object]:
        manifest = self._pipeline.bundle.manifest
        return {
            "kind": "bundle",
            "sha256": self._pipeline.bundle.sha256,
            "variant": manifest.variant,
            "precision": manifest.precision,
            "backend": self._pipeline.backend,
            "arithmetic": self._pipeline.arithmetic,
        }


class CheckpointArtist:
    """A checkpoint in torch, in float32, where its modules lie, sampled with PNDM. Its `draw` raises ScoreError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        side = torch_pipeline.latent_size(checkpoint)
        self._checkpoint = checkpoint
        self.latent_shape = (int(checkpoint.unet.config["in_channels"]), side, side)
        self.guidance_scale = checkpoint.guidance_scale

    def draw(
        self, captions: Sequence[str], noise: Sequence[Noise], settings: Settings, on_step: Callable[[float], object]
    ) -> Iterator[Pixels]:
        for start in range(0, len(captions), settings.batch_size):
            these = slice(start, start + settings.batch_size)
            pictures = torch_pipeline.draw(
                self._checkpoint,
                captions[these],
                torch.from_numpy(np.stack(noise[these])),
                steps=settings.steps,
                guidance=settings.guidance_scale,
                on_step=on_step,
            )
            yield from pictures

    def identity(self) -> dict[str, object]:
        weights: dict[str, Any] = digests.of_parts(self._checkpoint)
        return {
            "kind": "checkpoint",
            "sha256": weights,
            "variant": self._checkpoint.variant,
            "device": self._checkpoint.unet.device.type,
        }
