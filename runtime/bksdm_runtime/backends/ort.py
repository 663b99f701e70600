"""ONNX Runtime on a CPU (backend "onnxruntime"), and the opening of a session for any of its providers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import Component, TensorSpec
from bksdm_runtime.cores import physical_cores
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.tensors import check_tensors, run_error, to_caller, to_graph

# Above every severity (4 is fatal): warnings about graph clean-up say nothing to a user, and each error that the
# library would print also comes as an exception, which becomes one sentence here.
_LOG_FATAL_ONLY = 4

library = cast(Any, onnxruntime)  # it ships no types; what comes out of it is cast where it arrives


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's, by its own name, with its options."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])


CPU = Provider("CPUExecutionProvider")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class _NodeArg(Protocol):
    name: str
    type: str
    shape: Sequence[int | str | None]


class Session(Protocol):
    def get_inputs(self) -> list[_NodeArg]: ...
    def get_outputs(self) -> list[_NodeArg]: ...
    def get_providers(self) -> list[str]: ...
    def run(self, names: list[str], inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]: ...


class OrtEngine:
    """One graph in an ONNX Runtime session; see `engine.Engine` for what a call takes and gives."""

    def __init__(
        self, name: str, component: Component, session: Session, backend: str, arithmetic: str, threads: int
    ) -> None:
        self.name = name
        self.component = component
        self.backend = backend
        self.arithmetic = arithmetic
        self.threads = threads
        self._session = session
        self._outputs = [spec.name for spec in component.outputs]

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ready = to_graph(self.name, self.component, inputs)
        try:
            arrays = self._session.run(self._outputs, ready)
        except Exception as error:  # the library's own exceptions share no base class
            raise run_error(self.name, ready, error, first_line(error)) from error
        return to_caller(dict(zip(self._outputs, arrays, strict=True)))


def open_component(bundle: Bundle, component: str, settings: EngineSettings) -> OrtEngine:
    """Open one component of the bundle. Raises EngineError."""
    arithmetic = arithmetic_of(bundle, settings)
    used = threads_of(settings)
    path = bundle.component_path(component)
    session = open_session(component, str(path), settings.backend, CPU, session_options(used, bundle))
    facts = bundle.manifest.components[component]
    check_session(component, facts, session)
    return OrtEngine(component, facts, session, settings.backend, arithmetic, used)


def arithmetic_of(bundle: Bundle, settings: EngineSettings) -> str:
    """What the graphs are written in: there is no other arithmetic to choose, and what is int8 stays so.

    Raises EngineError where another is asked for.
    """
    arithmetic = {"fp32": "f32", "fp16": "f16", "int8": "f32"}[bundle.manifest.precision]
    if settings.arithmetic not in ("auto", arithmetic):
        raise EngineError(
            f"backend {settings.backend!r} computes this bundle in {arithmetic}, not in {settings.arithmetic}: "
            "leave the arithmetic at auto, or take backend openvino"
        )
    return arithmetic


def threads_of(settings: EngineSettings) -> int:
    # Explicit, because the library's own count ignores a container's limit and pins threads outside its cores.
    return physical_cores() if settings.threads is None else settings.threads


def open_session(component: str, path: str, backend: str, provider: Provider, options: Any) -> Session:
    """A session of a graph's file on a provider that is really in use. Raises EngineError."""
    library.set_default_logger_severity(_LOG_FATAL_ONLY)
    if provider.name not in cast("list[str]", library.get_available_providers()):
        raise EngineError(
            f"backend {backend!r}: this onnxruntime has no {provider.name}; onnxruntime and onnxruntime-gpu "
            "share their files, so leave only one: pip uninstall onnxruntime, "
            "then pip install --force-reinstall 'bksdm[cuda]'"
        )
    chosen = [(provider.name, dict(provider.options))]
    try:
        session = cast(Session, library.InferenceSession(path, sess_options=options, providers=chosen))
    except Exception as error:  # the library's own exceptions share no base class
        raise EngineError(f"{component}: ONNX Runtime cannot open {path}: {first_line(error)}") from error
    active = session.get_providers()
    if provider.name not in active:  # ONNX Runtime falls back to the CPU without an error
        raise EngineError(
            f"backend {backend!r}: {provider.name} did not start (running: {', '.join(active)}); "
            "check the driver and the CUDA and cuDNN versions that this onnxruntime-gpu needs"
        )
    return session


def check_session(name: str, component: Component, session: Session) -> None:
    """A session's own inputs and outputs must be those that bundle.json promises. Raises EngineError."""
    check_tensors(name, "input", component.inputs, _specs(session.get_inputs()))
    check_tensors(name, "output", component.outputs, _specs(session.get_outputs()))


def session_options(threads: int, bundle: Bundle) -> Any:
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graphs are chains: there is nothing to run side by side
    # A pattern plans a second block of memory beside what the first call took: a guided 512 px evaluation of tiny then
    # holds 5.9 GB, without it 3.7 GB in the same time (docs/cpu.md).
    options.enable_mem_pattern = False
    options.log_severity_level = _LOG_FATAL_ONLY
    if bundle.manifest.storage == "int8" and bundle.manifest.precision == "fp32":
        # Only then are int8 weights made fp32 once, as the graph is loaded, and not at each call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _specs(nodes: Sequence[_NodeArg]) -> list[TensorSpec]:
    return [
        TensorSpec(
            node.name,
            _DTYPES.get(node.type, node.type),
            tuple(axis if isinstance(axis, int) else str(axis) for axis in node.shape),
        )
        for node in nodes
    ]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
