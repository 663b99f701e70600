"""What goes into a graph and comes out of it, held against what bundle.json promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.contract import Component, TensorSpec
from bksdm_runtime.engine import EngineError

_OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "out of memory",
    "out_of_memory",
    "allocation failed",
)


def check_tensors(
    component: str, side: str, promised: Sequence[TensorSpec], found: Sequence[TensorSpec], *, narrowed: bool = False
) -> None:
    """A graph's own inputs or outputs (`side`) must be those that bundle.json promises. Raises EngineError.

    An axis without a fixed size is text in `found`: it disproves nothing. narrowed: nor does a size that bundle.json
    leaves open, as a plan built for one shape has.
    """
    tensors = {spec.name: spec for spec in found}
    if tensors.keys() != {spec.name for spec in promised}:
        names = ", ".join(spec.name for spec in promised)
        raise EngineError(
            f"{component}: the graph's {side}s are {', '.join(tensors) or 'nothing'}, bundle.json says {names}"
        )
    for spec in promised:
        has = tensors[spec.name]
        if has.dtype != spec.dtype:
            raise EngineError(f"{component}: {side} {spec.name} is {has.dtype}, bundle.json says {spec.dtype}")
        fits = len(has.axes) == len(spec.axes) and all(
            not isinstance(size, int) or wanted == size or (narrowed and not isinstance(wanted, int))
            for wanted, size in zip(spec.axes, has.axes, strict=True)
        )
        if not fits:
            raise EngineError(
                f"{component}: {side} {spec.name} is {list(has.axes)}, bundle.json says {list(spec.axes)}"
            )


def to_graph(
    name: str, component: Component, inputs: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """The inputs in the graph's dtypes, checked against its specs. Raises EngineError."""
    specs = {spec.name: spec for spec in component.inputs}
    if specs.keys() != inputs.keys():
        raise EngineError(f"{name} takes {', '.join(specs)}, was given {', '.join(inputs) or 'nothing'}")
    ready: dict[str, NDArray[np.generic]] = {}
    for tensor, array in inputs.items():
        spec = specs[tensor]
        fits = array.ndim == len(spec.axes) and all(
            isinstance(axis, str) or axis == size for axis, size in zip(spec.axes, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(axis) for axis in spec.axes)
            raise EngineError(f"{name}: {tensor} must be [{wanted}], was given {list(array.shape)}")
        ready[tensor] = np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))
    return ready


def to_caller(outputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """The outputs with every floating-point array as float32."""
    return {
        name: array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in outputs.items()
    }


def run_error(name: str, inputs: Mapping[str, NDArray[np.generic]], error: Exception, reason: str) -> EngineError:
    """What a library raised while it ran the graph `name`, as one sentence; reason: what it said, in one line."""
    shapes = ", ".join(f"{tensor} {list(array.shape)}" for tensor, array in inputs.items())
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return EngineError(f"{name} ran out of memory at {shapes}: use a smaller size or --batch-size 1")
    return EngineError(f"{name} failed at {shapes}: {reason}")
