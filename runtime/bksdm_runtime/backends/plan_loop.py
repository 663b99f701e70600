"""The memories of a picture that is being drawn on the device, and what runs on them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.backends.device import THREADS, DeviceError, Event, Graph, HostMemory, Memory, Stream
from bksdm_runtime.backends.loaded_plan import Bound, Part
from bksdm_runtime.contract import DEEP
from bksdm_runtime.engine import EngineError
from bksdm_runtime.evaluations import Evaluation
from bksdm_runtime.step_table import COLUMNS, MOST_EVALUATIONS, PAST

Array = NDArray[np.float32]

_MOST_ROWS = THREADS  # of a U-Net evaluation: `advance` is one block

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One kind of evaluation with the step after it. graph: of both, None where the context cannot be captured."""

    bound: Bound
    rows: int
    full: bool
    graph: Graph | None


class Loop:
    """The memories of a picture that is being drawn, of one size, and what runs on them.

    The next input always has 2 B rows, the latents twice: an unguided evaluation reads the first B of them.
    """

    def __init__(self, unet: Part, latents: tuple[int, ...], context: tuple[int, ...], shallow: Part | None) -> None:
        self.unet, self.shallow = unet, shallow
        self.latents_shape, self.context_shape = latents, context
        self._batch, self._size = latents[0], int(np.prod(latents[1:]))
        if 2 * self._batch > _MOST_ROWS:
            raise EngineError(f"{unet.name} takes at most {_MOST_ROWS // 2} pictures at once on this backend")
        self._dtypes = {spec.name: spec.dtype for spec in unet.component.inputs}
        place = unet.loaded.device
        self.stream = Stream(place)
        count, half = self._batch * self._size, np.dtype(self._dtypes["sample"]).itemsize
        self._latents, self._history = place.memory(4 * count), place.memory(4 * count * PAST)
        self._table = place.memory(4 * MOST_EVALUATIONS * COLUMNS)
        self._guidance, self._index = place.memory(4 * self._batch), place.memory(4)
        self._sample, self._timestep = place.memory(2 * half * count), place.memory(2 * 4 * self._batch)
        self._on_host = [HostMemory(place, latents) for _ in range(2)]
        self._step, self._advance = place.kernels(_ptx(), f"step_{self._dtypes['sample']}", "advance")
        self._stages: dict[tuple[bool, bool], Stage] = {}
        self._deep: dict[int, Memory] = {}  # by the rows of it
        self._newest_deep = 0  # of how many rows

    def start(self, table: Array, timestep: float, latents: Array, context: Array, guidance: Array) -> None:
        """Begin a picture. table: see step_table; context: [2B, 77, D], or [B, 77, D] unguided."""
        rows, upload = 2 * self._batch, self.stream.upload
        upload(self._table, table)
        upload(self._latents, np.ascontiguousarray(latents, np.float32))
        upload(self._guidance, np.ascontiguousarray(guidance, np.float32))
        upload(self._index, np.zeros(1, np.int32))
        upload(self._timestep, np.full(rows, timestep, np.float32))
        self._context = context
        for stage in self._stages.values():
            self._fill_context(stage)

    def scale_first(self, scale: float, latents: Array) -> None:
        twice = np.tile(latents * np.float32(scale), (2, 1, 1, 1))
        self.stream.upload(self._sample, twice.astype(self._dtypes["sample"]))

    def step(self, now: Evaluation, slot: int) -> Event:
        """Ask for an evaluation and the step after it, its latents into host memory `slot`."""
        stage = self.stage(now)
        if stage.full:
            self._newest_deep = stage.rows
        elif self._newest_deep != stage.rows:
            # From guided to unguided: the prompts' half, which stands last. The next one finds it there.
            source, target = self._deep[self._newest_deep], self._deep[stage.rows]
            self.stream.copy(source, target, target.size, source.size - target.size)
            self._newest_deep = stage.rows
        if stage.graph is not None:
            self.stream.replay(stage.graph)
        else:
            stage.bound.run()
            self._step_after(stage.bound, stage.rows)
        self.stream.download(self._latents, self._on_host[slot])
        return self.stream.done()

    def latents(self, slot: int, when: Event) -> Array:
        """A new array of what a step left in host memory `slot`."""
        when.wait()
        return np.array(self._on_host[slot].array)

    def stage(self, now: Evaluation) -> Stage:
        """What runs such an evaluation, made when it is first asked for. Raises EngineError."""
        full = now.full or self.shallow is None
        key = now.guided, full
        if key not in self._stages:
            part = self.unet if full or self.shallow is None else self.shallow
            rows = self._batch * (2 if now.guided else 1)
            shapes: dict[str, tuple[int, ...]] = {
                "sample": (rows, *self.latents_shape[1:]),
                "timestep": (rows,),
                "encoder_hidden_states": (rows, *self.context_shape),
            }
            given = {"sample": self._sample, "timestep": self._timestep}
            deep = next((spec for spec in self.unet.component.outputs if spec.name == DEEP), None)
            if deep is not None:
                shape = (rows, *(axis for axis in deep.axes[1:2] if isinstance(axis, int)), *self.latents_shape[2:])
                size = int(np.prod(shape)) * np.dtype(deep.dtype).itemsize
                if rows not in self._deep:
                    self._deep[rows] = self.unet.loaded.device.memory(size)
                given[DEEP] = self._deep[rows]
                if not full:
                    shapes[DEEP] = shape
            bound = Bound(part, shapes, given, self.stream)
            bound.run()  # on zeros: a context allocates in its first run, which no capture may hold
            graph = self._captured(bound, rows)
            self._stages[key] = Stage(bound, rows, full, graph)
            self._fill_context(self._stages[key])
        return self._stages[key]

    def _captured(self, bound: Bound, rows: int) -> Graph | None:
        if not bound.can_be_captured:
            log.warning("%s at %s rows is not captured as a CUDA graph, which is slower", self.unet.name, rows)
            return None

        def work() -> None:
            bound.run()
            self._step_after(bound, rows)

        try:
            return self.stream.capture(work)
        except (DeviceError, EngineError) as error:
            log.warning(
                "%s at %s rows is not captured as a CUDA graph, which is slower: %s", self.unet.name, rows, error
            )
            return None

    def _step_after(self, bound: Bound, rows: int) -> None:
        tables = self._table, self._guidance, self._index
        self.stream.launch(
            self._step,
            self._batch * self._size,
            *(bound.memories["out_sample"], self._latents, self._history, self._sample, *tables),
            *(rows, self._batch, self._size),
        )
        self.stream.launch(self._advance, 2 * self._batch, self._timestep, self._table, self._index, 2 * self._batch)

    def _fill_context(self, stage: Stage) -> None:
        """The context of its rows: unguided, the prompts' half, which stands last."""
        if len(self._context) >= stage.rows:
            stage.bound.fill({"encoder_hidden_states": self._context[len(self._context) - stage.rows :]})


@cache
def _ptx() -> bytes:
    return Path(__file__).with_name("step.ptx").read_bytes()
