"""ONNX Runtime: the CPU provider (backend "onnxruntime") and the CUDA provider (backend "cuda")."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import Component, TensorSpec
from bksdm_runtime.engine import EngineError, to_caller, to_graph

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
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate", "out of memory", "allocation failed")


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

    def __init__(self, name: str, component: Component, session: _Session, backend: str, threads: int) -> None:
        self.name = name
        self.component = component
        self.backend = backend
        self.threads = threads
        self._session = session
        self._outputs = [spec.name for spec in component.outputs]

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ready = to_graph(self.name, self.component, inputs)
        try:
            arrays = self._session.run(self._outputs, ready)
        except Exception as error:  # the library's own exceptions share no base class
            raise _explain(self.name, ready, error) from error
        return to_caller(dict(zip(self._outputs, arrays, strict=True)))


def open_component(bundle: Bundle, component: str, *, backend: str, threads: int | None) -> OrtEngine:
    """Open one component of the bundle; `backend` is "onnxruntime" or "cuda". Raises EngineError."""
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
    used = physical_cores() if threads is None else threads
    chosen = [(provider, _PROVIDER_OPTIONS[backend])]
    try:
        session = cast(
            _Session, _library.InferenceSession(str(path), sess_options=_session_options(used), providers=chosen)
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
    _check_tensors(component, "input", facts.inputs, session.get_inputs())
    _check_tensors(component, "output", facts.outputs, session.get_outputs())
    return OrtEngine(component, facts, session, backend, used)


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


def _session_options(threads: int) -> Any:
    options = _library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graphs are chains: there is nothing to run side by side
    options.log_severity_level = _LOG_FATAL_ONLY
    return options


def physical_cores() -> int:
    """Cores that this process may use, two hardware threads of one core counted once; a container's quota respected."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows: no affinity to respect
        return max(1, os.cpu_count() or 1)
    usable = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "200000 100000": microseconds of each period
    limit, _, period = quota.read_text().strip().partition(" ") if quota.is_file() else ("max", "", "")
    allowed = max(1, int(limit) // int(period)) if limit.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), allowed))


def _check_tensors(component: str, side: str, specs: Sequence[TensorSpec], found: Sequence[_NodeArg]) -> None:
    """The session's own tensors must be those that bundle.json promises."""
    tensors = {node.name: node for node in found}
    if tensors.keys() != {spec.name for spec in specs}:
        promised = ", ".join(spec.name for spec in specs)
        raise EngineError(f"{component}: the graph's {side}s are {', '.join(tensors)}, bundle.json says {promised}")
    for spec in specs:
        node = tensors[spec.name]
        dtype = _DTYPES.get(node.type, node.type)
        if dtype != spec.dtype:
            raise EngineError(f"{component}: {side} {spec.name} is {dtype}, bundle.json says {spec.dtype}")
        # A symbolic size in the graph disproves nothing; a fixed one must be the promised one.
        fits = len(node.shape) == len(spec.axes) and all(
            not isinstance(has, int) or promised == has for promised, has in zip(spec.axes, node.shape, strict=True)
        )
        if not fits:
            raise EngineError(
                f"{component}: {side} {spec.name} is {list(node.shape)}, bundle.json says {list(spec.axes)}"
            )


def _explain(name: str, inputs: Mapping[str, NDArray[np.generic]], error: Exception) -> EngineError:
    shapes = ", ".join(f"{tensor} {list(array.shape)}" for tensor, array in inputs.items())
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return EngineError(f"{name} ran out of memory at {shapes}: use a smaller size or --batch-size 1")
    return EngineError(f"{name} failed at {shapes}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
