"""What draws pictures to score in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bksdm import digests
from bksdm.checkpoint import Checkpoint
from bksdm_evaluation import torch_pipeline
from bksdm_evaluation.artists import Noise, Pixels, Settings


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
