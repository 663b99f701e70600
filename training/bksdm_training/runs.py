"""What every run on captioned pictures does beside its loop: begin, or refuse to go on; count what it skips."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from bksdm.checkpoint import Checkpoint
from bksdm_training import checkpointing, records
from bksdm_training.config import RunConfig
from bksdm_training.examples import Batch
from bksdm_training.records import ResumeError
from bksdm_training.sources import Skips

logger = logging.getLogger(__name__)
# What may change between two calls that go on with one run: speed and memory, not what is learnt.
FREE = ("micro_batch", "gradient_checkpointing", "compiled", "workers", "skip_limit", "shown")
FREE_OF_LOOP = ("steps", "checkpoint_every", "keep", "accumulate", "fused")
CHECK_SKIPS_EVERY = 20  # steps
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


def begin(output: Path, now: Mapping[str, object], said: Mapping[str, str], accelerator: Accelerator) -> None:
    """`records.same_run` by the main process; what it refuses, every process refuses. Raises ResumeError."""
    refused: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            records.same_run(output, now, said)
        except (ResumeError, OSError) as error:
            refused = [str(error)]
    broadcast_object_list(refused)
    if refused[0] is not None:
        raise ResumeError(refused[0])


class SkipCount:
    """Examples that could not be used, of all processes; every process ends where their share is too large."""

    def __init__(self, lost: Skips, limit: float) -> None:
        self.total, self.limit = copy.deepcopy(lost), limit
        self.since = Skips()  # of this process, since they were last put together
        self.told = 0

    def add(self, batch: Batch) -> None:
        self.since.add(batch.skipped, used=len(batch.timesteps))
        for skip in batch.skipped:
            self.told += 1
            if self.told <= TELL_SKIPS:
                logger.warning("skipped %s", skip)

    def check(self, step: int) -> None:
        """At the same steps in every process. Raises DataError."""
        if step % CHECK_SKIPS_EVERY == 0:
            self.gather()
            self.total.check(self.limit)

    def gather(self) -> None:
        """Put together what all processes skipped."""
        for skips in cast(list[Skips], gather_object([self.since])):
            self.total.merge(skips)
        self.since = Skips()

    def summary(self) -> dict[str, object]:
        """Counts by reason, for records."""
        return {"seen": self.total.seen, "skipped": self.total.skipped, "reasons": dict(self.total.reasons)}
