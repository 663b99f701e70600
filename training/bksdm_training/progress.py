"""What a training says of itself while it runs: a bar or lines for people, a log of its losses for charts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from bksdm_training.config import LoopConfig


class Progress:
    """A bar on stderr where that is a terminal; elsewhere a line a checkpoint, for a log keeps every state of a bar."""

    def __init__(
        self,
        name: str,
        done: int,
        config: LoopConfig,
        pictures_at: Callable[[int], int] | None = None,
        *,
        shown: bool = True,
    ) -> None:
        self.name, self.done, self.config = name, done, config
        self.pictures_at = pictures_at or (lambda step: config.batch_size)
        self.pictures, self.started, self.since = 0, time.monotonic(), time.monotonic()
        self.shown = shown
        self.bar = tqdm(
            total=config.steps,
            initial=done,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=None if shown else True,  # None: off where stderr is no terminal
        )

    def stepped(self, step: int, figures: Mapping[str, float]) -> None:
        self.pictures += self.pictures_at(step)
        shown = summed(figures)
        rate = self.pictures / (time.monotonic() - self.since)
        self.bar.set_postfix(
            {**{key: f"{value:.4f}" for key, value in shown.items()}, "images/s": f"{rate:.1f}"}, refresh=False
        )
        self.bar.update()

    def saved(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if self.bar.disable and self.shown:
            losses = ", ".join(f"{key} {value:.4f}" for key, value in summed(figures).items())
            rate = self.pictures / (now - self.since)  # since the line before, checkpoint and samples included
            left = tqdm.format_interval((now - self.started) / (step - self.done) * (self.config.steps - step))
            line = f"{self.name}: step {step:,} of {self.config.steps:,}, {losses}, {rate:.1f} images/s, {left} left"
            tqdm.write(line, file=sys.stderr)
        self.pictures, self.since = 0, now

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def summed(figures: Mapping[str, float]) -> dict[str, float]:
    """Terms that are numbered ("feature_0", "feature_1") as one sum: a line has room for no more."""
    sums: dict[str, float] = {}
    for key, value in figures.items():
        name = key.rstrip("0123456789").rstrip("_")
        sums[name] = sums.get(name, 0.0) + value
    return sums


class Log:
    """Append-only loss log; steps after the resumed state are dropped, since they are trained again."""

    def __init__(self, path: Path, first: int, *, written: bool = True) -> None:
        self.file = None
        if not written:  # the main process writes it
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path.parent) if row["step"] < first]
        staging = path.with_name(f".{path.name}")
        staging.write_text("".join(json.dumps(row) + "\n" for row in kept))
        staging.replace(path)
        self.file = path.open("a", buffering=1)  # a line at a time: what a kill can cut off is one line

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self.file:
            # 7 digits, not decimals: a feature term can be a millionth
            self.file.write(json.dumps({"step": step, **{k: float(f"{v:.7g}") for k, v in figures.items()}}) + "\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The loss log of a stage: one {"step", term: value, ...} a step."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may have cut the last one
