"""The sampler's table as a device reads it: one row of floats for each U-Net evaluation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.contract import Component
from bksdm_runtime.engine import EngineError
from bksdm_runtime.schedule import Schedule

PAST = 5  # earlier outputs that a device remembers
COLUMNS = 5 + PAST
MOST_EVALUATIONS = 1024  # room in the table: 1,000 steps, and PNDM's one more


def step_table(schedule: Schedule, backend: str) -> NDArray[np.float32]:
    """[1024, 10]; rows past the schedule's are zero.

    Columns: factors of latents and of output in what is remembered; of latents; of the next input; the next timestep;
    of what is remembered, newest first. Raises EngineError where there is no room for the schedule.
    """
    evaluations = len(schedule.timesteps)
    if evaluations > MOST_EVALUATIONS:
        raise EngineError(
            f"backend {backend} takes at most {MOST_EVALUATIONS} U-Net evaluations a picture, found {evaluations}: "
            "use fewer steps, or another backend"
        )
    rows = np.zeros((MOST_EVALUATIONS, COLUMNS), np.float32)
    rows[:evaluations, :2] = schedule.keep
    rows[:evaluations, 2] = schedule.a
    rows[: evaluations - 1, 3] = schedule.input_scale[1:]
    rows[: evaluations - 1, 4] = schedule.timesteps[1:]
    rows[:evaluations, COLUMNS - PAST : COLUMNS - PAST + schedule.b.shape[1]] = schedule.b
    return rows


def is_stepped(unet: Component) -> bool:
    """Whether a device can take the steps: timesteps in float32, and output and input alike. Else the host does."""
    dtypes = {spec.name: spec.dtype for spec in (*unet.inputs, *unet.outputs)}
    return dtypes["timestep"] == "float32" and dtypes["sample"] == dtypes["out_sample"]
