"""From one U-Net evaluation to the next without leaving the device: guidance, a row of the sampler's table, the next
input. The graph of it is step_*.onnx, made by bksdm_export.step_graph."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.backends import ort
from bksdm_runtime.backends.buffers import Bound, Numbers, Place, on_host
from bksdm_runtime.schedule import Schedule
from bksdm_runtime.step_table import COLUMNS, MOST_EVALUATIONS, PAST, step_table

Array = NDArray[np.float32]


class Walk:
    """Latents and what is remembered of earlier outputs, in two sets of buffers: a step reads one and writes the other.

    They stay where they are from picture to picture, so that a captured graph stays right.
    """

    def __init__(self, session: Any, place: Place, latents: tuple[int, ...], numbers: Numbers) -> None:
        self._session = session
        self._batch = latents[0]
        self._numbers = numbers

        def zeros(*shape: int, dtype: str = "float32") -> Any:
            return place.buffer(np.zeros(shape, dtype))

        self._fixed = {
            "table": zeros(MOST_EVALUATIONS, self._batch, COLUMNS, 1, 1, 1),
            "guidance": zeros(self._batch, 1, 1, 1),
        }
        self._sets = [
            {
                "latents": zeros(*latents),
                "history": zeros(latents[0], PAST, *latents[1:]),
                "index": zeros(1, dtype="int64"),
            }
            for _ in range(2)
        ]
        self._turn = 0
        # From source to target; an entry goes with either of them, and the buffers that it binds go with it.
        self._pairs: WeakKeyDictionary[Bound, WeakKeyDictionary[Bound, list[Bound]]] = WeakKeyDictionary()

    def start(self, schedule: Schedule, latents: Array, guidance: Array) -> None:
        """Begin a picture. Raises EngineError where the schedule has more rows than there is room for."""
        self._turn = 0
        self._fixed["table"].update_inplace(table(schedule, self._batch))
        self._fixed["guidance"].update_inplace(np.ascontiguousarray(guidance, np.float32)[:, None, None, None])
        first = self._sets[0]
        first["latents"].update_inplace(np.ascontiguousarray(latents, np.float32))
        first["history"].update_inplace(np.zeros(first["history"].shape(), np.float32))
        first["index"].update_inplace(np.zeros(1, np.int64))

    def step(self, source: Bound, target: Bound) -> Array:
        """From what a U-Net gave in `source` to what it is to read in `target`; the latents after it, a new array."""
        onward = self._pairs.setdefault(source, WeakKeyDictionary())
        if target not in onward:
            onward[target] = [self._bind(source, target, turn) for turn in range(2)]
        onward[target][self._turn].run()
        self._turn = 1 - self._turn
        return cast(Array, on_host(self._sets[self._turn]["latents"]))

    def _bind(self, source: Bound, target: Bound, turn: int) -> Bound:
        given, next_rows = source.outputs["out_sample"], target.inputs["sample"].shape()[0]
        rows = given.shape()[0]
        here, there = self._sets[turn], self._sets[1 - turn]
        on_cpu = {
            "negative_end": [self._batch],
            "positive_start": [rows - self._batch],
            "repeats": [next_rows // self._batch, 1, 1, 1],
        }
        small = {name: ort.library.OrtValue.ortvalue_from_numpy(np.array(v, np.int64)) for name, v in on_cpu.items()}
        return Bound(
            self._session,
            {"out_sample": given, **here, **self._fixed, **small},
            {
                **{f"next_{name}": value for name, value in there.items()},
                "sample": target.inputs["sample"],
                "timestep": target.inputs["timestep"],
            },
            self._numbers.next(),
        )


def table(schedule: Schedule, batch: int) -> Array:
    """The sampler's table as step_*.onnx reads it, [1024, B, 10, 1, 1, 1]. Raises EngineError, see step_table."""
    rows = step_table(schedule, "cuda")
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (len(rows), batch, COLUMNS)))[..., None, None, None]
