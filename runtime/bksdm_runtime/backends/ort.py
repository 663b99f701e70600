"""ONNX Runtime: the CPU provider (backend "onnxruntime") and the CUDA provider (backend "cuda")."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
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

log = logging.getLogger(__name__)

_library = cast(Any, onnxruntime)  # it ships no types; what comes out of it is cast where it arrives

_PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html; no GPU has run them here yet.
_PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "onnxruntime": {},
    "cuda": {
        "use_tf32": "0",  # on by default, and 10 bits of mantissa: not the fp32 that a bundle's parity promises
        # The default, EXHAUSTIVE, times the algorithms and may choose another each run (onnxruntime issue 19822).
        "cudnn_conv_algo_search": "HEURISTIC",
    },
}
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


class _Session(Protocol):
    def get_inputs(self) -> list[_NodeArg]: ...
    def get_outputs(self) -> list[_NodeArg]: ...
    def get_providers(self) -> list[str]: ...
    def run(self, names: list[str], inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]: ...


class OrtEngine:
    """One graph in an ONNX Runtime session; see `engine.Engine` for what a call takes and gives."""

    def __init__(
        self, name: str, component: Component, session: _Session, backend: str, arithmetic: str, threads: int
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
            raise run_error(self.name, ready, error, _first_line(error)) from error
        return to_caller(dict(zip(self._outputs, arrays, strict=True)))


def open_component(bundle: Bundle, component: str, settings: EngineSettings) -> OrtEngine:
    """Open one component of the bundle; the settings' backend is "onnxruntime" or "cuda". Raises EngineError."""
    backend = settings.backend
    # It computes in what the graph is written in: it has no other arithmetic to choose. What is int8 stays so.
    arithmetic = {"fp32": "f32", "fp16": "f16", "int8": "f32"}[bundle.manifest.precision]
    if settings.arithmetic not in ("auto", arithmetic):
        raise EngineError(
            f"backend {backend!r} computes this bundle in {arithmetic}, not in {settings.arithmetic}: "
            "leave the arithmetic at auto, or take backend openvino"
        )
    _library.set_default_logger_severity(_LOG_FATAL_ONLY)
    provider = _PROVIDERS[backend]
    if provider not in cast("list[str]", _library.get_available_providers()):
        raise EngineError(
            f"backend {backend!r}: this onnxruntime has no {provider}; onnxruntime and onnxruntime-gpu share their "
            "files, so leave only one: pip uninstall onnxruntime, then pip install --force-reinstall 'bksdm[cuda]'"
        )
    if backend == "cuda":
        _preload_cuda()
    path = bundle.component_path(component)
    # Explicit, because the library's own count ignores a container's limit and pins threads outside its cores.
    used = physical_cores() if settings.threads is None else settings.threads
    chosen = [(provider, _PROVIDER_OPTIONS[backend])]
    try:
        session = cast(
            _Session,
            _library.InferenceSession(str(path), sess_options=_session_options(used, bundle), providers=chosen),
        )
    except Exception as error:  # the library's own exceptions share no base class
        raise EngineError(f"{component}: ONNX Runtime cannot open {path}: {_first_line(error)}") from error
    active = session.get_providers()
    if provider not in active:  # ONNX Runtime falls back to the CPU without an error
        raise EngineError(
            f"backend {backend!r}: {provider} did not start (running: {', '.join(active)}); "
            "check the driver and the CUDA and cuDNN versions that this onnxruntime-gpu needs"
        )
    facts = bundle.manifest.components[component]
    check_tensors(component, "input", facts.inputs, _specs(session.get_inputs()))
    check_tensors(component, "output", facts.outputs, _specs(session.get_outputs()))
    return OrtEngine(component, facts, session, backend, arithmetic, used)


def _preload_cuda() -> None:
    """Load CUDA and cuDNN where pip put them (ONNX Runtime 1.21 and later), which the loader itself never searches.

    What it cannot load is no error yet: the system may have it elsewhere, and the provider tells when it starts.
    """
    preload = getattr(_library, "preload_dlls", None)
    if preload is None:
        return
    said = io.StringIO()
    with redirect_stdout(said):  # it prints, and stdout carries paths
        preload()
    if said.getvalue().strip():
        log.info("%s", said.getvalue().strip())


def _session_options(threads: int, bundle: Bundle) -> Any:
    options = _library.SessionOptions()
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
