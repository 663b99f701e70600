"""Pictures of many captions through the runtime, one generator each: picture i has seed `seed + i`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from bksdm_runtime.pipeline import Images, Pipeline, Step
from bksdm_runtime.request import Request


def generate(
    pipeline: Pipeline,
    captions: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    on_step: Callable[[float], object],
    batch_size: int | None = None,
) -> list[Image.Image]:
    """RGB pictures of the captions at the bundle's own size, in order.

    on_step is told what share of its pictures each U-Net evaluation made; in all that is their number.
    Raises what Pipeline.generate raises."""
    requests = [
        Request(prompt=caption, seed=seed + index, steps=steps, guidance_scale=guidance_scale)
        for index, caption in enumerate(captions)
    ]
    pictures: dict[int, Image.Image] = {}
    for event in pipeline.generate(requests, batch_size=batch_size):
        match event:
            case Step(positions=positions, total=total):
                on_step(len(positions) / total)
            case Images(positions=positions, pixels=pixels):
                for position, one in zip(positions, pixels, strict=True):
                    pictures[position] = Image.fromarray(one)
    return [pictures[index] for index in range(len(captions))]
