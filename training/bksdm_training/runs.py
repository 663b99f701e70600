"""What tells one run from another, so that it goes on with nothing else; and errors that all processes share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from bksdm_training import records
from bksdm_training.config import RunConfig
from bksdm_training.data import DataError
from bksdm_training.records import ResumeError

# What may change between two calls that go on with one run: speed and memory, not what is learnt.
FREE = ("micro_batch", "gradient_checkpointing", "compiled", "workers", "skip_limit", "shown")
FREE_OF_LOOP = ("steps", "checkpoint_every", "keep", "accumulate", "fused")
KNOWN = (ResumeError, DataError, OSError)  # what `together` hands on


def settings(config: RunConfig) -> dict[str, object]:
    """What two calls that go on with one run must agree on."""
    values = asdict(config)
    values["loop"] = {key: value for key, value in values["loop"].items() if key not in FREE_OF_LOOP}
    return {key: value for key, value in values.items() if key not in FREE}


def made_on(*facts: object) -> str:
    """One hash of what a run depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def together(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something in the main process alone; what it raises, every process raises, and none waits for the others.

    Raises the errors of `KNOWN`."""
    found: list[tuple[int, str] | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except KNOWN as error:
            kind = next(place for place, known in enumerate(KNOWN) if isinstance(error, known))
            found = [(kind, str(error))]
    broadcast_object_list(found)
    if found[0] is not None:
        kind, text = found[0]
        raise KNOWN[kind](text)


def begin(output: Path, now: Mapping[str, object], said: Mapping[str, str], accelerator: Accelerator) -> None:
    """`records.same_run` by the main process; what it refuses, every process refuses. Raises ResumeError, OSError."""
    together(accelerator, lambda: records.same_run(output, now, said))
