"""Engines: one graph of a bundle, ready to run. A backend's library is imported only when that backend is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import Component


class EngineError(Exception):
    """An engine cannot be opened or failed while running; the message is one sentence for the user."""


class MissingBackend(EngineError):  # noqa: N818 - reads as what it says
    """The backend's library is not installed; the message names the extra that brings it."""


class Engine(Protocol):
    """One open graph. Calls take and return arrays by name, as the component's specs say.

    Floating-point inputs of any dtype are cast to the graph's; floating-point outputs come back as float32.
    Raises EngineError on wrong inputs, when memory runs out and when the backend fails.
    """

    @property
    def backend(self) -> str: ...

    @property
    def component(self) -> Component: ...

    @property
    def threads(self) -> int:
        """How many it uses, whoever chose them: another number may round differently."""
        ...

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]: ...


@dataclass(frozen=True)
class _Backend:
    """Where a backend lives: its module has open_component(bundle, component, *, backend, threads) -> Engine."""

    module: str
    library: str
    extra: str


_BACKENDS: Mapping[str, _Backend] = {
    "onnxruntime": _Backend("bksdm_runtime.backends.ort", "onnxruntime", "cpu"),
    "cuda": _Backend("bksdm_runtime.backends.ort", "onnxruntime", "cuda"),
}
BACKENDS = tuple(_BACKENDS)
AUTO = "onnxruntime"  # what "auto" means until a second CPU backend is measured to be faster


class _BackendModule(Protocol):
    def open_component(self, bundle: Bundle, component: str, *, backend: str, threads: int | None) -> Engine: ...


def resolve_backend(backend: str) -> str:
    """The backend's own name for "auto". Raises EngineError naming the valid ones."""
    name = AUTO if backend == "auto" else backend
    if name not in _BACKENDS:
        raise EngineError(f"backend {backend!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    return name


def open_engine(bundle: Bundle, component: str, *, backend: str = "auto", threads: int | None = None) -> Engine:
    """Open one component of the bundle; threads: how many the backend may use, None for one per physical core.

    Raises EngineError, MissingBackend when the library is absent, BundleError when the bundle has no such component.
    """
    name = resolve_backend(backend)
    if threads is not None and threads < 1:
        raise EngineError(f"threads must be at least 1, found {threads}")
    bundle.component_path(component)
    wanted = _BACKENDS[name]
    try:
        module = cast(_BackendModule, importlib.import_module(wanted.module))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != wanted.library:
            raise
        raise MissingBackend(f"backend {name!r} needs {wanted.library}: pip install 'bksdm[{wanted.extra}]'") from None
    except ImportError as error:  # installed, but its own libraries do not load
        raise EngineError(f"backend {name!r} is installed but does not load: {error}") from error
    return module.open_component(bundle, component, backend=name, threads=threads)


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
