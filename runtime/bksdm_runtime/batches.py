"""Micro-batches: which requests share their U-Net evaluations, and how many fit a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bksdm_runtime.evaluations import Evaluation, plan_evaluations
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import Schedule, make_schedule

# A constant, not the free memory of the moment: the same call then makes the same batches every time. Two images of
# 256 px and guidance fit six times over; one of 512 px does not, and runs alone, where a CPU gains nothing by batching.
MEMORY_BUDGET = 2 << 30
# Past this a batch only delays the first picture.
LARGEST_AUTOMATIC_BATCH = 16


@dataclass(frozen=True)
class Batch:
    """Requests that go through the loop together, with their places in the caller's list and their schedule."""

    positions: tuple[int, ...]
    requests: tuple[Request, ...]
    schedule: Schedule
    evaluations: tuple[Evaluation, ...]
    height: int
    width: int

    @property
    def guided(self) -> bool:
        return any(evaluation.guided for evaluation in self.evaluations)


def plan(
    requests: Sequence[Request], config: Mapping[str, object], vae_scale_factor: int, largest: int | None, budget: int
) -> list[Batch]:
    """Group requests (size and guidance filled in) that agree in all that a batch shares; the first keep their order.

    largest: the most to put in a batch, None for what fits `budget` bytes. Raises ScheduleError.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, request in enumerate(requests):
        strength = request.strength if request.init_image is not None else None
        guided = request.guidance > 1
        saved = (request.guidance_interval, request.cache_interval)
        key = (request.size, request.sampler, request.steps, guided, strength, *saved)
        groups.setdefault(key, []).append(position)
    batches: list[Batch] = []
    for positions in groups.values():
        first = requests[positions[0]]
        height, width = first.size
        strength = first.strength if first.init_image is not None else None
        schedule = make_schedule(config, steps=first.steps, sampler=first.sampler, strength=strength)
        evaluations = plan_evaluations(
            len(schedule.timesteps),
            guided=first.guidance > 1,
            guidance_interval=first.guidance_interval,
            cache_interval=first.cache_interval,
        )
        fits = batch_limit(height, width, vae_scale_factor, first.guidance > 1, budget)
        share = fits if largest is None else largest
        for start in range(0, len(positions), share):
            chosen = tuple(positions[start : start + share])
            batches.append(Batch(chosen, tuple(requests[i] for i in chosen), schedule, evaluations, height, width))
    return batches


def batch_limit(height: int, width: int, vae_scale_factor: int, guided: bool, budget: int) -> int:
    """How many images fit `budget` bytes of U-Net activations, from 1 to LARGEST_AUTOMATIC_BATCH."""
    each = unet_bytes(height // vae_scale_factor * (width // vae_scale_factor)) * (2 if guided else 1)
    return max(1, min(LARGEST_AUTOMATIC_BATCH, budget // each))


def unet_bytes(latent_pixels: int) -> int:
    """Bytes of activations that one sample needs at the U-Net's peak, for the SD-v1 width (narrower ones need less).

    Three float32 copies of the outermost self-attention's scores (8 heads, n x n), and 48 KiB a latent pixel for the
    rest. Peak resident memory over the idle session, ONNX Runtime 1.32, fp32, the tiny U-Net, against this:
    1 x 32x32 latents 133 MiB (144), 8 x 32x32 1178 (1152), 1 x 64x64 1651 (1728).
    """
    return 3 * 8 * 4 * latent_pixels**2 + 48 * 1024 * latent_pixels
