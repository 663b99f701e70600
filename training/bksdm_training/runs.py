"""What every run on captioned pictures does beside its loop: begin, or refuse to go on; count what it skips."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from bksdm.checkpoint import Checkpoint
from bksdm_training import checkpointing, records
from bksdm_training.config import LoopConfig, RunConfig
from bksdm_training.data import DataError
from bksdm_training.examples import Batch
from bksdm_training.records import ResumeError
from bksdm_training.sources import Skips

logger = logging.getLogger(__name__)
# What may change between two calls that go on with one run: speed and memory, not what is learnt.
FREE = ("micro_batch", "gradient_checkpointing", "compiled", "workers", "skip_limit", "shown")
FREE_OF_LOOP = ("steps", "checkpoint_every", "keep", "accumulate", "fused")
CHECK_SKIPS_EVERY = 20  # steps
KNOWN = (ResumeError, DataError, OSError)  # what `together` hands on
_SKIPS = "skipped.json"
TELL_SKIPS = 20  # of a process, one by one; the rest are counted


def settings(config: RunConfig) -> dict[str, object]:
    """What two calls that go on with one run must agree on."""
    values = asdict(config)
    values["loop"] = {key: value for key, value in values["loop"].items() if key not in FREE_OF_LOOP}
    return {key: value for key, value in values.items() if key not in FREE}


def digests(whole: Checkpoint) -> dict[str, str]:
    """SHA-256 of the weights of each part."""
    parts = {"text_encoder": whole.text_encoder, "unet": whole.unet, "vae": whole.vae}
    return {name: checkpointing.digest(part.state_dict()) for name, part in parts.items()}


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


def track(accelerator: Accelerator, name: str, states: Path) -> None:
    """Begin, or go on with, the run's curves: what comes after the newest state is trained and logged again."""
    found = checkpointing.steps(states) if states.is_dir() else []
    options = {"tensorboard": {"purge_step": found[-1] + 1}} if found else {}
    accelerator.init_trackers(name, init_kwargs=options)


class SkipCount:
    """Examples that could not be used, of all processes; every process ends where their share is too large.

    folder: of the states, where a run that goes on finds what it had counted."""

    def __init__(self, lost: Skips, limit: float, folder: Path) -> None:
        self.total, self.limit, self.taken = _counted(folder) or copy.deepcopy(lost), limit, False
        self.since = Skips()  # of this process, since they were last put together
        self.told = 0

    def add(self, batch: Batch) -> None:
        self.since.add(batch.skipped, used=len(batch.timesteps))
        for skip in batch.skipped:
            self.told += 1
            if self.told <= TELL_SKIPS:
                logger.warning("skipped %s", skip)

    def check(self, step: int, loop: LoopConfig) -> None:
        """At the same steps in every process, and before every state. Raises DataError."""
        self.taken = True
        if step % CHECK_SKIPS_EVERY == 0 or step % loop.checkpoint_every == 0 or step == loop.steps:
            self.gather()
            self.total.check(self.limit)

    def write(self, staging: Path) -> None:
        """Beside the state that they belong to."""
        records.write_json(staging / _SKIPS, self.summary())

    def gather(self) -> None:
        """Put together what all processes skipped."""
        for skips in cast(list[Skips], gather_object([self.since])):
            self.total.merge(skips)
        self.since = Skips()

    def summary(self) -> dict[str, object]:
        """Counts by reason, for records."""
        return {"seen": self.total.seen, "skipped": self.total.skipped, "reasons": dict(self.total.reasons)}


def _counted(folder: Path) -> Skips | None:
    """What the newest state of an earlier call had counted."""
    found = checkpointing.steps(folder) if folder.is_dir() else []
    try:
        record = json.loads((folder / f"step-{found[-1]:08d}" / _SKIPS).read_text())
        return Skips(int(record["seen"]), Counter(record["reasons"]))
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None
