"""Graphs bound to buffers that stay where they are on a device, and the numbers of their CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.backends import ort
from bksdm_runtime.backends.ort import Provider


@dataclass(frozen=True)
class Place:
    """Where sessions run and buffers lie. captures: whether a shape's kernels are replayed as one CUDA graph."""

    provider: Provider
    device: str
    captures: bool

    def buffer(self, array: NDArray[np.generic]) -> Any:
        """A copy of the array on the device, an OrtValue."""
        return ort.library.OrtValue.ortvalue_from_numpy(array, self.device, 0)


class Bound:
    """A graph at one set of shapes: buffers that stay where they are on the device, and the run that fills them.

    inputs, outputs: the library's OrtValues by name. number: of the CUDA graph that the run is captured as, if any.
    """

    def __init__(self, session: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], number: int | None) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        self._session = session
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = run_options(number)

    def fill(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Copy arrays of the buffers' own dtypes and shapes into inputs."""
        for name, array in arrays.items():
            self.inputs[name].update_inplace(np.ascontiguousarray(array))

    def run(self) -> None:
        """Returns when the device is done."""
        self._session.run_with_iobinding(self._binding, self._options)


class Numbers:
    """Numbers of one session's CUDA graphs; none past `most`, and none where nothing is captured."""

    def __init__(self, place: Place, most: int) -> None:
        self._most = most if place.captures else 0
        self._given = 0

    def next(self) -> int | None:
        if self._given >= self._most:
            return None
        self._given += 1
        return self._given


def on_host(value: Any) -> NDArray[np.generic]:
    """A copy, also where the buffer lies on the host itself."""
    return np.array(value.numpy())


def run_options(number: int | None) -> Any:
    options = ort.library.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1" if number is None else str(number))
    return options
