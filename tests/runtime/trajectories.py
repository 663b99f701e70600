"""What the loops on a device are held to: the latents after every step, of requests of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from bksdm_runtime.pipeline import Pipeline, Step
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import SAMPLERS

PLAIN = Request("a red apple", "grey", seed=3, steps=6, guidance_scale=7.5, height=64, width=128)

CHANGES: dict[str, dict[str, Any]] = {
    **{sampler: {"sampler": sampler} for sampler in SAMPLERS},
    "one step": {"steps": 1},
    "pndm, 25 steps": {"steps": 25},
    "unguided": {"guidance_scale": 1.0},
    "guided in between": {"guidance_interval": (0.3, 0.8)},
    "another size": {"height": 128, "width": 64},
}

CACHED: dict[str, dict[str, Any]] = {
    "cached, guided": {"cache_interval": 3},
    "cached, guided at first": {"cache_interval": 2, "guidance_interval": (0.0, 0.5)},
    "cached, guided at last": {"cache_interval": 3, "guidance_interval": (0.5, 1.0)},
    "cached, unguided": {"cache_interval": 2, "guidance_scale": 1.0},
}


def steps(pipeline: Pipeline, *requests: Request) -> list[tuple[float, np.ndarray]]:
    return [(item.timestep, item.latents) for item in pipeline.generate(requests) if isinstance(item, Step)]


def differ(one: Pipeline, other: Pipeline, *requests: Request) -> float:
    """The most that latents differ after any step, over the largest of them."""
    found, wanted = steps(one, *requests), steps(other, *requests)
    assert [timestep for timestep, _ in found] == [timestep for timestep, _ in wanted]
    pairs = list(zip(found, wanted, strict=True))
    return max(float(np.abs(got - want).max() / np.abs(want).max()) for (_, got), (_, want) in pairs)
