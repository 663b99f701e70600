"""One training on captioned pictures, around the loop: feeds it, counts what is skipped, writes what it makes."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from bksdm_training import checkpointing, loop, records
from bksdm_training.charts import save_curve
from bksdm_training.checkpointing import State
from bksdm_training.config import LoopConfig, RunConfig
from bksdm_training.examples import Batch, Feed
from bksdm_training.material import Material
from bksdm_training.progress import read_log, summed
from bksdm_training.records import ResumeError
from bksdm_training.sources import Skips

logger = logging.getLogger(__name__)
CHECK_SKIPS_EVERY = 20  # steps
TELL_SKIPS = 20  # of a process, one by one; the rest are counted
_SKIPS = "skipped.json"
# (model, this process's examples, their positions) -> the terms of the loss
LossOf = Callable[[nn.Module, Batch, range], Mapping[str, Tensor]]


class Product(Protocol):
    """What a training makes. The main process alone calls these."""

    def write(self, step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        """Into a state that is being written."""
        ...

    def show(self, step: int, average: Mapping[str, Tensor], folder: Path) -> None:
        """Pictures, into a state that is whole; they may fail."""
        ...

    def publish(self, state: State, folder: Path) -> Mapping[str, object]:
        """What a finished run is called for, from its newest state in `folder`; facts for training.json."""
        ...


def fit(
    name: str,
    module: nn.Module,
    loss_of: LossOf,
    product: Product,
    config: RunConfig,
    material: Material,
    output: Path,
    accelerator: Accelerator,
    *,
    made_on: str,
) -> None:
    """Train `module`, or go on, and leave `output` with the product, its curve and training.json.

    made_on: as loop.run takes it. Raises ResumeError, DataError (too much of the data is unusable), DivergedError."""
    states = output / "states"
    parts = config.parts(accelerator.num_processes)
    feed = Feed(
        material.examples,
        batch_size=config.loop.batch_size,
        parts=parts,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=config.workers,
        pinned=accelerator.device.type == "cuda",
    )
    skips = SkipCount(material.lost, config.skip_limit, states, accelerator)

    def loss_at(model: nn.Module, step: int, part: int) -> Mapping[str, Tensor]:
        batch = feed.batch(step, part)
        skips.add(batch)
        return loss_of(model, batch, feed.positions(step, part))

    def on_checkpoint(step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        product.write(step, average, staging)
        records.write_json(staging / _SKIPS, skips.summary())

    def on_saved(step: int, average: Mapping[str, Tensor], folder: Path) -> None:
        save_curve([summed(row) for row in read_log(states)], output / "loss.png", title=name)
        product.show(step, average, folder)

    _track(accelerator, name, states)
    loop.run(
        name,
        module,
        loss_at,
        replace(config.loop, accumulate=parts),
        states,
        accelerator=accelerator,
        on_checkpoint=on_checkpoint,
        on_saved=on_saved,
        made_on=made_on,
        on_step=lambda step: skips.check(step, config.loop),
    )
    if accelerator.is_main_process and (skips.stepped or not (output / "training.json").is_file()):
        state = checkpointing.load_newest(states)
        if state is None:
            raise ResumeError(f"{states} is gone: run the command again")
        facts = {
            **product.publish(state, states / f"step-{state.step:08d}"),
            "config": asdict(config),
            "data": described(material),
            "seconds": round(float(str(state.facts["seconds"]))),
            "skipped": skips.summary(),
            "processes": accelerator.num_processes,
            "parts": parts,
            "mixed_precision": str(accelerator.mixed_precision),
            **records.machine(accelerator.device, "transformers", "accelerate", "peft"),
        }
        records.write_json(output / "training.json", facts)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it ends the processes' group


def described(material: Material) -> dict[str, object]:
    """The data of a run, for records and for telling one from another."""
    return {**material.about, "identity": material.examples.identity}


def network_dtype(accelerator: Accelerator) -> torch.dtype:
    """What frozen networks are held in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


class SkipCount:
    """Examples that could not be used, of all processes; every process ends where their share is too large.

    states: where a run that goes on finds what it had counted."""

    def __init__(self, lost: Skips, limit: float, states: Path, accelerator: Accelerator) -> None:
        counted: list[Skips | None] = [_counted(states) if accelerator.is_main_process else None]
        broadcast_object_list(counted)  # the folder need not be shared, and all must judge alike
        self.total, self.limit = counted[0] or copy.deepcopy(lost), limit
        self.stepped = False  # whether this call took a step
        self.since = Skips()  # of this process, since they were last put together
        self.told = 0

    def add(self, batch: Batch) -> None:
        self.since.add(batch.skipped, used=len(batch.timesteps))
        for skip in batch.skipped:
            self.told += 1
            if self.told <= TELL_SKIPS:
                logger.warning("skipped %s", skip)

    def check(self, step: int, config: LoopConfig) -> None:
        """At the same steps in every process, and before every state. Raises DataError."""
        self.stepped = True
        if step % CHECK_SKIPS_EVERY == 0 or step % config.checkpoint_every == 0 or step == config.steps:
            for skips in cast(list[Skips], gather_object([self.since])):
                self.total.merge(skips)
            self.since = Skips()
            self.total.check(self.limit)

    def summary(self) -> dict[str, object]:
        """Counts by reason, for records."""
        return {"seen": self.total.seen, "skipped": self.total.skipped, "reasons": dict(self.total.reasons)}


def _counted(states: Path) -> Skips | None:
    """What the newest state of an earlier call had counted."""
    found = checkpointing.steps(states) if states.is_dir() else []
    try:
        record = json.loads((states / f"step-{found[-1]:08d}" / _SKIPS).read_text())
        return Skips(int(record["seen"]), Counter(record["reasons"]))
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None


def _track(accelerator: Accelerator, name: str, states: Path) -> None:
    """Begin, or go on with, the run's curves: what comes after the newest state is trained and logged again."""
    found = checkpointing.steps(states) if states.is_dir() else []
    options = {"tensorboard": {"purge_step": found[-1] + 1}} if found else {}
    accelerator.init_trackers(name, init_kwargs=options)
