"""What draws pictures to score, from noise that is given: a bundle on any backend, here without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
