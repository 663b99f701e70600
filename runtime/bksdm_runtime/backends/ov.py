"""OpenVINO on the CPU (backend "openvino"): reads the bundle's ONNX as it is, compiles it for the shapes of a call."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, cast

import numpy as np
import openvino
from numpy.typing import NDArray

from bksdm_runtime.bundle import Bundle
from bksdm_runtime.compiled_cache import Entry
from bksdm_runtime.contract import Component, TensorSpec
from bksdm_runtime.cores import physical_cores
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.mapped import release
from bksdm_runtime.tensors import check_tensors, run_error, to_caller, to_graph

log = logging.getLogger(__name__)

_library = cast(Any, openvino)  # its own types say little; what comes out of it is cast where it arrives

_DECOMPRESSION = "decompression_0"  # what ov::mark_as_decompression sets; only its presence is read

_DTYPES = {"f32": "float32", "f16": "float16", "i32": "int32", "i64": "int64"}


class _Port(Protocol):
    names: set[str]
    element_type: Any
    partial_shape: Any


class _Model(Protocol):
    inputs: list[_Port]
    outputs: list[_Port]

    def reshape(self, shapes: Mapping[str, Sequence[int]]) -> None: ...
    def get_ops(self) -> Sequence[Any]: ...


class _Request(Protocol):
    def infer(self, inputs: Mapping[str, NDArray[np.generic]], *, share_inputs: bool) -> Mapping[int, Any]: ...


class _Compiled(Protocol):
    outputs: list[_Port]

    def get_property(self, name: str) -> Any: ...
    def create_infer_request(self) -> _Request: ...
    def export_model(self) -> Any: ...


@dataclass(frozen=True)
class _Ready:
    """A graph compiled for one shape. places: of the outputs, by name; blob: what it was imported from, kept alive."""

    request: _Request
    places: Mapping[str, int]
    blob: NDArray[np.uint8] | None


Shapes = tuple[tuple[int, ...], ...]  # of the inputs, in the component's order


class OvEngine:
    """One graph on OpenVINO, compiled at the first call of a shape; see `engine.Engine` for what a call takes."""

    backend = "openvino"

    def __init__(self, bundle: Bundle, component: str, arithmetic: str, threads: int, settings: EngineSettings) -> None:
        self.name = component
        self.component = bundle.manifest.components[component]
        self.arithmetic = arithmetic
        self.threads = threads
        self.config = _config(arithmetic, threads, settings.pinning)  # what the library compiles with
        self._bundle = bundle
        self._cache = settings.compiled_cache
        self._kept = settings.kept_shapes
        self._model: _Model | None = None
        self._compiled: OrderedDict[Shapes, _Ready] = OrderedDict()
        self._compiling = Lock()  # a thread may prepare what another one is about to call

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ready = to_graph(self.name, self.component, inputs)
        shapes = tuple(ready[spec.name].shape for spec in self.component.inputs)
        try:
            prepared = self._for_shapes(shapes)
            # share_inputs: read where they lie; the outputs are copied out of the request's own memory.
            arrays = prepared.request.infer(ready, share_inputs=True)
        except EngineError:
            raise
        except Exception as error:  # the library raises plain RuntimeError
            raise run_error(self.name, ready, error, _reason(error)) from error
        return to_caller({spec.name: arrays[prepared.places[spec.name]] for spec in self.component.outputs})

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compile for inputs of these shapes; see `engine.Preparing`."""
        try:
            self._for_shapes(tuple(shapes[spec.name] for spec in self.component.inputs))
        except Exception as error:  # the call itself will meet it again, and say so
            log.debug("%s is not prepared: %s", self.name, error)

    def read(self) -> _Model:
        """The graph as the bundle has it, read once. Raises EngineError."""
        if self._model is None:
            self._model = _read(self._bundle.component_path(self.name), self.name, self.component)
        return self._model

    def _for_shapes(self, shapes: Shapes) -> _Ready:
        with self._compiling:
            if shapes not in self._compiled:
                while len(self._compiled) >= self._kept:
                    self._compiled.popitem(last=False)  # before the next one: no more in memory than are kept
                self._compiled[shapes] = self._compile(shapes)
            self._compiled.move_to_end(shapes)
            return self._compiled[shapes]

    def _compile(self, shapes: Shapes) -> _Ready:
        entry = None if self._cache is None else self._entry(self._cache, shapes)
        blob = None if entry is None else entry.read()
        compiled = None if entry is None or blob is None else _import(entry, blob, self.config)
        if compiled is None:
            model = self.read()
            model.reshape({spec.name: shape for spec, shape in zip(self.component.inputs, shapes, strict=True)})
            compiled = cast(_Compiled, _core().compile_model(model, "CPU", self.config))
            release(self._bundle.root)  # packed by now: a gigabyte of tiny's that would stay resident beside it
            if entry is not None:
                entry.write(compiled.export_model().getbuffer())
        does = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if does != self.arithmetic:
            raise EngineError(f"{self.name}: OpenVINO computes in {does} where {self.arithmetic} was asked for")
        places = {name: i for i, port in enumerate(compiled.outputs) for name in port.names}
        return _Ready(compiled.create_infer_request(), places, blob)

    def _entry(self, folder: Path, shapes: Shapes) -> Entry:
        return Entry.of(
            folder,
            bundle=self._bundle.sha256,
            component=self.name,
            shapes=repr(shapes),
            library=str(_library.get_version()),
            processor=str(_core().get_property("CPU", "FULL_DEVICE_NAME")),
            capabilities=repr(sorted(_capabilities())),
            config=repr(sorted(self.config.items())),
        )


def open_component(bundle: Bundle, component: str, settings: EngineSettings) -> OvEngine:
    """Open one component of the bundle. Raises EngineError."""
    has_bf16 = "BF16" in _capabilities()
    fastest = "bf16" if has_bf16 and not _is_bf16_slow() else "f32"
    arithmetic = fastest if settings.arithmetic == "auto" else settings.arithmetic
    if arithmetic not in ("f32", "bf16"):
        raise EngineError(f"backend 'openvino' computes in f32 or bf16, not in {arithmetic}")
    if arithmetic == "bf16" and not has_bf16:
        raise EngineError("this processor has no bf16 arithmetic (avx512_bf16 or amx_bf16): use f32, or auto")
    threads = physical_cores() if settings.threads is None else min(settings.threads, _usable())
    engine = OvEngine(bundle, component, arithmetic, threads, settings)
    if settings.compiled_cache is None:  # with a cache the graph itself may not be needed
        engine.read()
    return engine


def _usable() -> int:
    """The most threads that the library runs, however many it is asked for."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _config(arithmetic: str, threads: int, pinning: bool) -> dict[str, object]:
    return {
        "PERFORMANCE_HINT": "LATENCY",  # one call at a time, with every thread on it
        "INFERENCE_NUM_THREADS": threads,
        # Explicit both times: the default is bf16 wherever the processor has it.
        "INFERENCE_PRECISION_HINT": arithmetic,
        # The library's default is on, from the first usable core up: two processes of one thread then share that core.
        "ENABLE_CPU_PINNING": pinning,
        # The library's default, 32 with VNNI, rounds what meets weights stored as int8 to int8 too: 0.75 % off.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


@cache
def _core() -> Any:
    return _library.Core()


def _capabilities() -> list[str]:
    return cast("list[str]", _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _is_bf16_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is one of Intel's processors with AMX (Sapphire Rapids and later) whose AMX a hypervisor hides.

    bf16 is then left to AVX-512, which there has half of f32's speed: measured, docs/cpu-benchmark-no-amx.md. A rule,
    not a trial of both: a trial's outcome, and so the picture, could change with what else the machine does.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:  # no Linux
        return False
    facts = {key.strip(): value.split() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", [])
    return facts.get("vendor_id") == ["GenuineIntel"] and "avx512_fp16" in flags and "amx_bf16" not in flags


def _read(path: Path, name: str, component: Component) -> _Model:
    try:
        # Core.read_model asks every frontend what the file might be, and one of them writes to stderr.
        onnx = _library.frontend.FrontEndManager().load_by_framework("onnx")
        model = cast(_Model, onnx.convert(onnx.load(str(path))))
    except Exception as error:  # the library raises plain RuntimeError
        raise EngineError(f"{name}: OpenVINO cannot open {path}: {_reason(error)}") from error
    check_tensors(name, "input", component.inputs, _specs(model.inputs, component.inputs))
    check_tensors(name, "output", component.outputs, _specs(model.outputs, component.outputs))
    _leave_halves(model)
    return model


def _leave_halves(model: _Model) -> None:
    """Mark what makes float32 of weights stored as fp16 as OpenVINO's own files have it: decompression.

    Else it is folded as the graph is compiled, all of it to float32 before any of it is packed. Tiny's U-Net in bf16,
    the same output to the last bit: compiled in 0.64 s instead of 3.4, with 1.6 GB resident at most instead of 2.5.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Convert":
            source = node.input_value(0).get_node()
            if source.get_type_name() == "Constant" and source.get_output_element_type(0).get_type_name() == "f16":
                node.get_rt_info()[_DECOMPRESSION] = True


def _specs(ports: Sequence[_Port], promised: Sequence[TensorSpec]) -> list[TensorSpec]:
    wanted = {spec.name for spec in promised}
    specs: list[TensorSpec] = []
    for port in ports:
        # A tensor has every name that the graph ever gave it.
        name = min(port.names & wanted or port.names, default="(unnamed)")
        dtype = str(port.element_type.get_type_name())
        shape = port.partial_shape
        rank = range(len(shape)) if shape.rank.is_static else ()
        axes = tuple(shape[i].get_length() if shape[i].is_static else "?" for i in rank)
        specs.append(TensorSpec(name, _DTYPES.get(dtype, dtype), axes))
    return specs


def _import(entry: Entry, blob: NDArray[np.uint8], config: Mapping[str, object]) -> _Compiled | None:
    """What an earlier process compiled; None when this library cannot use it."""
    try:
        return cast(_Compiled, _core().import_model(_library.Tensor(blob, shared_memory=True), "CPU", config))
    except Exception as error:  # the library raises plain RuntimeError
        log.warning("the compiled graph %s is of no use, it is compiled anew: %s", entry.path, _reason(error))
        return None


def _reason(error: Exception) -> str:
    """Why, without where in its sources: the last line of what the library says."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip("- ")]
    return (lines or [type(error).__name__])[-1][:300]
