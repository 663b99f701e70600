"""Engines: one graph of a bundle, ready to run. A backend's library is imported only when that backend is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime import plans
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import Component
from bksdm_runtime.devices import cuda_devices
from bksdm_runtime.evaluations import Evaluation
from bksdm_runtime.schedule import Schedule

ARITHMETICS = ("auto", "f32", "bf16")

log = logging.getLogger(__name__)


class EngineError(Exception):
    """An engine cannot be opened or failed while running; the message is one sentence for the user."""


class MissingBackend(EngineError):  # noqa: N818 - reads as what it says
    """The backend's library is not installed; the message names the extra that brings it."""


@dataclass(frozen=True)
class EngineSettings:
    """How engines run.

    backend: a name of BACKENDS, or "auto", see resolve_backend.
    threads: how many a backend may use, None for one per physical core.
    arithmetic: "f32", "bf16", or "auto" for the fastest that the backend has on this machine; see Engine.arithmetic.
    pinning: whether OpenVINO ties its threads to cores.
    compiled_cache: a folder that keeps what OpenVINO or TensorRT-RTX compiled, for the next process; None keeps
    nothing.
    kept_shapes: how many shapes of a graph OpenVINO keeps compiled, each with its own copy of the weights, see
    docs/cpu.md. A run alternates between at most two: a whole and a last batch, or steps with and without guidance.
    """

    backend: str = "auto"
    threads: int | None = None
    arithmetic: str = "auto"
    pinning: bool = False
    compiled_cache: Path | None = None
    kept_shapes: int = 2


DEFAULT_SETTINGS = EngineSettings()


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

    @property
    def arithmetic(self) -> str:
        """What it multiplies and adds in: f32, bf16, or f16 where the graph itself is in half precision.

        In a bundle of precision int8, of all but the layers that are int8 in the graph.
        """
        ...

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]: ...


@runtime_checkable
class Preparing(Protocol):
    """An engine that has work to do once for each set of shapes, and can do it in a thread before it is called."""

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Do it for inputs of these shapes, by name. Raises nothing: what cannot be done, the call will report."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """A U-Net's engine that walks from noise to latents by itself, without bringing each step to the host."""

    def sample(
        self,
        schedule: Schedule,
        noise: NDArray[np.float32],
        context: NDArray[np.float32],
        guidance: NDArray[np.float32] | None,
        clean: NDArray[np.float32] | None = None,
        *,
        evaluations: Sequence[Evaluation] | None = None,
        shallow: Engine | None = None,
    ) -> Generator[tuple[float, NDArray[np.float32]], None, None]:
        """As `pipeline.sample` does, with itself for the U-Net. Raises EngineError."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """An engine that takes only the shapes that it was built for."""

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether it takes inputs of these shapes, by name."""
        ...


@dataclass(frozen=True)
class _Backend:
    """Where a backend lives: its module has open_component(bundle, component, settings) -> Engine.

    libraries: what it imports, by top-level name; extra: what brings them.
    """

    module: str
    libraries: tuple[str, ...]
    extra: str


_BACKENDS: Mapping[str, _Backend] = {
    "tensorrt": _Backend("bksdm_runtime.backends.trt", ("tensorrt", "cuda"), "tensorrt"),
    "tensorrt-rtx": _Backend("bksdm_runtime.backends.rtx", ("tensorrt_rtx", "cuda"), "tensorrt-rtx"),
    "cuda": _Backend("bksdm_runtime.backends.cuda", ("onnxruntime",), "cuda"),
    "openvino": _Backend("bksdm_runtime.backends.ov", ("openvino",), "openvino"),
    "onnxruntime": _Backend("bksdm_runtime.backends.ort", ("onnxruntime",), "cpu"),
}
BACKENDS = tuple(_BACKENDS)
ON_A_GPU = ("tensorrt", "tensorrt-rtx", "cuda")


class _BackendModule(Protocol):
    def open_component(self, bundle: Bundle, component: str, settings: EngineSettings) -> Engine: ...


def has_cuda() -> bool:
    """Whether backend cuda can be expected to start: an ONNX Runtime that is built for it, and a device."""
    if not _is_installed("onnxruntime-gpu") or not cuda_devices():
        return False
    if _is_installed("onnxruntime"):
        log.warning(
            "onnxruntime and onnxruntime-gpu share their files and both are installed, so the GPU is left alone: "
            "pip uninstall onnxruntime, then pip install --force-reinstall 'bksdm[cuda]'"
        )
        return False
    return True


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def resolve_backend(backend: str, bundle: Bundle | None = None, *, without: Collection[str] = ()) -> str:
    """The backend's own name for "auto": the first of these that is there. TensorRT and then TensorRT-RTX, where the
    bundle has engines for it and there is a CUDA device; cuda, where there is one; openvino; onnxruntime.

    Says in the log which and why. without: what it must not be. Raises EngineError naming the valid ones.
    """
    if backend == "auto":
        chosen, why = next(found for found in _candidates(bundle) if found[0] not in without)
        log.info("backend auto: %s, because %s", chosen, why)
        return chosen
    if backend not in _BACKENDS:
        raise EngineError(f"backend {backend!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    return backend


def _candidates(bundle: Bundle | None) -> Iterator[tuple[str, str]]:
    """What "auto" may be, the best first, and why it may."""
    for name in plans.LIBRARIES:
        if bundle is not None and importlib.util.find_spec(_BACKENDS[name].libraries[0]) and cuda_devices():
            if plans.built(bundle, name):
                yield name, f"the bundle has engines for {plans.LIBRARIES[name][0]} and there is a CUDA device"
            else:
                log.info("backend auto: not %s, because the bundle has no engines for it (see bksdm-build)", name)
    if has_cuda():
        yield "cuda", "onnxruntime-gpu is installed and there is a CUDA device"
    # It has bf16 where the processor does; in f32 an evaluation of tiny took 11.6 to 12.3 s of CPU, ONNX Runtime's
    # 12.4 to 13.7. Opening a graph takes it longer (docs/cpu.md).
    if importlib.util.find_spec("openvino") is not None:
        yield "openvino", "openvino is installed"
    yield "onnxruntime", "openvino is not installed"


def open_engine(bundle: Bundle, component: str, settings: EngineSettings = DEFAULT_SETTINGS) -> Engine:
    """Open one component of the bundle.

    Raises EngineError, MissingBackend when the library is absent, BundleError when the bundle has no such component.
    """
    name = resolve_backend(settings.backend, bundle)
    if settings.threads is not None and settings.threads < 1:
        raise EngineError(f"threads must be at least 1, found {settings.threads}")
    bundle.component_path(component)
    wanted = _BACKENDS[name]
    try:
        module = cast(_BackendModule, importlib.import_module(wanted.module))
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in wanted.libraries:
            raise
        raise MissingBackend(f"backend {name!r} needs {missing}: pip install 'bksdm[{wanted.extra}]'") from None
    except ImportError as error:  # installed, but its own libraries do not load
        raise EngineError(f"backend {name!r} is installed but does not load: {error}") from error
    return module.open_component(bundle, component, replace(settings, backend=name))
