"""What the CPU benchmark asks of a contender's process, and what it answers. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """kind: a key of cpu_kinds.KINDS; model: what it opens; options: of the contender's row. started: time.time() when
    the process was started. noise: a file of raw float32 [1, C, h, w], what torch's CPU generator draws for `seed`.
    pictures: how many of batch 1 after the first; batches: sizes of which one set each is drawn at the end."""

    kind: str
    model: str
    options: dict[str, Any]
    prompt: str
    seed: int
    steps: int
    size: int
    guidance: float
    threads: int
    started: float
    noise: str
    picture: str
    pictures: int
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """One picture, or one batch of them. steps: seconds between the ends of two guided steps, so one less than there
    are; text, decode: of all prompts and pictures, None where the contender does not tell; cpu_seconds: of all
    threads."""

    batch: int
    seconds: float
    cpu_seconds: float
    steps: list[float]
    text: float | None
    decode: float | None


@dataclass(frozen=True)
class Result:
    """first_step, first_picture: seconds since the process was started. peak: bytes, largest resident set up to the end
    of the pictures of batch 1."""

    first_step: float
    first_picture: float
    drawn: list[Drawn]
    peak: int
    versions: dict[str, str]


@dataclass
class Watch:
    """What a contender notes while it draws."""

    steps: list[float] = field(default_factory=list)  # when each ended, by time.perf_counter
    stages: dict[str, float] = field(default_factory=dict)
    first_step: float | None = None  # time.time() of the first of all

    def step(self) -> None:
        self.first_step = time.time() if self.first_step is None else self.first_step
        self.steps.append(time.perf_counter())

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - began

        return run


class Contender(Protocol):
    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        """Pillow images, noting each step and what else it knows in the watch that it was opened with."""
        ...

    def after(self) -> None:
        """Measure what could not be while drawing."""
        ...
