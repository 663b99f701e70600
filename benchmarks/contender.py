"""One side of the training benchmark in a process of its own: steps it, and writes seconds, losses and peak memory.

python benchmarks/contender.py JSON     (a Task, made by training.py)"""

from __future__ import annotations

import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import published
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel

from bksdm import checkpoint
from bksdm.checkpoint import Checkpoint
from bksdm.variants import VARIANTS
from bksdm_training import cache, loop, progress
from bksdm_training.allocator import keep_freed_memory
from bksdm_training.config import DistillConfig
from bksdm_training.distill import distill
from bksdm_training.examples import Batch, Feed
from bksdm_training.material import open_material
from bksdm_training.sources import open_source

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class Task:
    """side: "ours", "published", or "cache" (encode `pictures` into `data`). teacher: random, or a checkpoint."""

    side: str
    variant: str
    teacher: str
    data: str
    pictures: str
    size: int
    batch: int
    warmup: int
    steps: int
    precision: str
    device: str
    workers: int = 0
    cache_dtype: str = "fp16"
    gradient_checkpointing: bool = False
    compiled: bool = False
    profile: bool = False


@dataclass(frozen=True)
class Result:
    """seconds: of each step after the warm-up (a cache: of the whole); cpu_seconds: likewise, of all threads. losses:
    of every step. Peaks in bytes: of the process (largest resident set, since its start), of the device (tensors
    alone). phases: seconds a step by name, on a CPU those of all threads."""

    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[dict[str, float]]
    peak: int
    device_peak: int | None
    machine: dict[str, Any]
    phases: dict[str, float] = field(default_factory=dict)


class _Enough(Exception):  # noqa: N818
    """As many steps as were asked for: raised before anything is saved."""


class _Timekeeper:
    """Called after every step with its losses."""

    def __init__(self, task: Task, phases: _Phases) -> None:
        self.task, self.phases = task, phases
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[dict[str, float]] = []
        self.last = self.last_cpu = 0.0

    def __call__(self, figures: dict[str, float]) -> None:
        _wait(self.task.device)
        now, now_cpu = time.perf_counter(), time.process_time()
        self.losses.append(figures)
        if len(self.losses) > self.task.warmup:
            self.seconds.append(now - self.last)
            self.cpu_seconds.append(now_cpu - self.last_cpu)
        else:
            self.phases.seconds.clear()
        if len(self.seconds) == self.task.steps:
            raise _Enough
        self.last, self.last_cpu = time.perf_counter(), time.process_time()


class _Phases:
    """Where a step's time goes: seconds inside the calls that make it up, the same for both sides."""

    def __init__(self, device: str) -> None:
        self.device = device
        # Where a core is shared with other processes, the time on it is what compares.
        self.clock = time.perf_counter if device == "cuda" else time.process_time
        self.seconds: dict[str, float] = {}

    def watch(self) -> None:
        self._time(Feed, "batch", lambda _: "data")
        self._time(AutoencoderKL, "encode", lambda _: "autoencoder")
        self._time(CLIPTextModel, "forward", lambda _: "text encoder")
        self._time(UNet2DConditionModel, "forward", lambda u: "student forward" if u.training else "teacher forward")
        self._time(Accelerator, "backward", lambda _: "backward")
        self._time(Accelerator, "clip_grad_norm_", lambda _: "clip")
        self._time(torch.optim.AdamW, "step", lambda _: "optimizer")
        self._time(loop, "_average", lambda _: "average")
        self._time(EMAModel, "step", lambda _: "average")

    def _time(self, owner: Any, name: str, phase: Callable[[Any], str]) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            _wait(self.device)
            started = self.clock()
            try:
                return original(*args, **kwargs)
            finally:
                _wait(self.device)
                key = phase(args[0])
                self.seconds[key] = self.seconds.get(key, 0.0) + self.clock() - started

        setattr(owner, name, timed)


class _Tracker(GeneralTracker):
    """How the loop of bksdm_training tells what a step's losses were."""

    name = "benchmark"
    requires_logging_directory = False
    tracker = None  # type: ignore[assignment]

    def __init__(self, told: Callable[[dict[str, float]], None]) -> None:
        super().__init__()
        self.told = told

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told(progress.summed({key: value for key, value in values.items() if key != "learning_rate"}))


def measure(task: Task) -> Result:
    phases = _Phases(task.device)
    keeper = _Timekeeper(task, phases)
    accelerator = Accelerator(
        cpu=task.device == "cpu", mixed_precision="no" if task.precision == "fp32" else task.precision
    )
    row = VARIANTS[task.variant]
    teacher = checkpoint.load(task.teacher, variant=row.teacher if task.teacher == "random" else None)
    if task.profile:
        phases.watch()
    if task.side == "cache":
        source = open_source(Path(task.pictures))
        started = time.perf_counter()
        at_once = min(task.batch, 16)
        folder = Path(task.data)
        cache.build(teacher, source, folder, accelerator, size=task.size, dtype=task.cache_dtype, batch_size=at_once)
        keeper.seconds.append(time.perf_counter() - started)
    else:
        with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
            SIDES[task.side](task, teacher, accelerator, keeper, Path(folder))
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    on_device = torch.cuda.max_memory_allocated() if task.device == "cuda" else None
    named = phases.seconds
    if task.profile:
        named["rest"] = sum(keeper.seconds if task.device == "cuda" else keeper.cpu_seconds) - sum(named.values())
    return Result(
        keeper.seconds,
        keeper.cpu_seconds,
        keeper.losses,
        usage,
        on_device,
        _machine(task.device),
        {key: value / max(1, task.steps) for key, value in named.items()},
    )


def _config(task: Task) -> DistillConfig:
    """The published run's settings, as `bksdm-train distill` takes them."""
    published_run = DistillConfig()
    return replace(
        published_run,
        size=task.size,
        loop=replace(published_run.loop, batch_size=task.batch, fused=True),
        gradient_checkpointing=task.gradient_checkpointing,
        compiled=task.compiled,
        workers=task.workers,
        shown=0,
    )


def _ours(task: Task, teacher: Checkpoint, accelerator: Accelerator, keeper: _Timekeeper, folder: Path) -> None:
    accelerator.log_with = [_Tracker(keeper)]
    if task.device == "cpu":
        keep_freed_memory()  # as the command does
    config = _config(task)
    material = open_material(Path(task.data), teacher, config)
    distill(config, teacher, VARIANTS[task.variant], material, folder, accelerator)


def _published(task: Task, teacher: Checkpoint, accelerator: Accelerator, keeper: _Timekeeper, _: Path) -> None:
    config = _config(task)
    material = open_material(Path(task.pictures), teacher, config)
    feed = Feed(material.examples, batch_size=task.batch, parts=1, process=0, processes=1, workers=task.workers)

    def batches() -> Iterator[Batch]:
        for step in range(1, config.loop.steps + 1):
            yield feed.batch(step, 0)

    published.train(config, teacher, VARIANTS[task.variant], batches(), accelerator, keeper)


SIDES = {"ours": _ours, "published": _published}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Task(**json.loads(sys.argv[1]))))))
