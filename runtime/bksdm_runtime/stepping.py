"""What a sampler does around a U-Net evaluation: the loop in schedule.py's docstring, an operation each.

Element by element throughout, so a picture's numbers do not depend on what stands beside it in an array.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.schedule import Schedule

Array = NDArray[np.float32]
History = tuple[Array, ...]  # newest first, as long as a row of b at most


def first_latents(schedule: Schedule, noise: Array, clean: Array | None) -> Array:
    """Where the walk begins, [B, C, h, w], from noise and what image-to-image starts from."""
    x = noise * np.float32(schedule.initial[1])
    if clean is not None:
        x = clean * np.float32(schedule.initial[0]) + x
    return x


def guided(output: Array, guidance: Array) -> Array:
    """What the U-Net gave for the negative prompts and then for the prompts, [2B, C, h, w] -> [B, C, h, w].

    guidance: [B]. Classifier-free guidance, arXiv 2207.12598.
    """
    negative, positive = np.split(output, 2)
    return cast(Array, negative + guidance[:, None, None, None] * (positive - negative))


def next_latents(schedule: Schedule, i: int, x: Array, output: Array, history: History) -> tuple[Array, History]:
    """The latents after evaluation `i` and what is remembered of it; x, output: [B, C, h, w]."""
    f = np.float32
    remembered = x * f(schedule.keep[i, 0]) + output * f(schedule.keep[i, 1])
    history = (remembered, *history)[: schedule.b.shape[1]]
    x = x * f(schedule.a[i])
    for weight, past in zip(schedule.b[i], history, strict=False):
        if weight:
            x = x + past * f(weight)
    return x, history
