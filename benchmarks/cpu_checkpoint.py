"""Random weights at true architecture as a diffusers checkpoint that is sampled with Euler's method.

python benchmarks/cpu_checkpoint.py VARIANT FOLDER"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from bksdm import checkpoint

# The one spacing that stable-diffusion.cpp knows ("discrete"); the others take it from the checkpoint's settings.
SPACING = "linspace"


def main(variant: str, folder: str) -> None:
    made = checkpoint.load("random", variant=variant)
    shared = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "steps_offset")
    settings = {key: made.scheduler_config[key] for key in shared}
    euler = {"_class_name": "EulerDiscreteScheduler", **settings, "timestep_spacing": SPACING}
    checkpoint.save(replace(made, scheduler_config=euler), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
