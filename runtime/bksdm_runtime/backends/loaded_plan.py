"""A plan on the device: how it gets there, and what runs it at one set of shapes."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime import plans
from bksdm_runtime.backends.device import Device, Memory, Stream
from bksdm_runtime.contract import Component, TensorSpec
from bksdm_runtime.engine import EngineError
from bksdm_runtime.plans import Plan

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}

_BUDGETS = Lock()

log = logging.getLogger(__name__)


class Contexts(Protocol):
    """How a library makes execution contexts of a plan."""

    def new(self, engine: Any) -> Any: ...

    def ran(self) -> None:
        """One of them has run for the first time: what was compiled meanwhile can be kept."""
        ...


class Listener:
    """What a library says: to our log, and its first error, which later ones follow from, for our own message.

    One for the life of the process: while a runtime is there, a library goes on with the first logger it was given.
    """

    def __init__(self, library: Any) -> None:
        listener = self
        self.error = ""
        severities = library.ILogger.Severity

        class Logger(library.ILogger):
            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (severities.ERROR, severities.INTERNAL_ERROR) and not listener.error:
                    listener.error = (message.strip().splitlines() or [""])[0][:300]
                log.debug("%s", message)

        self.logger: Any = Logger()


@cache
def listener_of(library: Any) -> Listener:
    return Listener(library)


@dataclass(frozen=True)
class Loaded:
    """A plan on the device. engine: the library's own; listener: who hears what it says."""

    plan: Plan
    engine: Any
    device: Device
    listener: Listener
    contexts: Contexts

    def why(self) -> str:
        said, self.listener.error = self.listener.error, ""
        return said or "TensorRT says no more"


@dataclass(frozen=True)
class Part:
    """A component of a bundle as it is open: its name, what bundle.json says of it, and its plan on the device."""

    name: str
    component: Component
    loaded: Loaded


class Bound:
    """A plan at one set of shapes: an execution context, and memories by name that stay where they are.

    given: memories of others to read or write in place of its own.
    """

    def __init__(
        self, part: Part, shapes: Mapping[str, Sequence[int]], given: Mapping[str, Memory], stream: Stream
    ) -> None:
        name, loaded = part.name, part.loaded
        loaded.listener.error = ""  # of another plan, or of a capture that was given up
        profile = loaded.plan.key.profile_for(shapes)
        if profile is None:
            raise EngineError(outside(name, loaded.plan, shapes))
        self._name, self._loaded, self._stream = name, loaded, stream
        self._context = loaded.contexts.new(loaded.engine)
        if self._context is None:
            raise EngineError(f"{name}: no execution context (out of memory?): {loaded.why()}")
        self._expect(self._context.set_optimization_profile_async(profile, stream.handle), "takes no profile")
        stream.wait()
        self.memories: dict[str, Memory] = {}
        self.shapes = {tensor: tuple(shape) for tensor, shape in shapes.items()}
        for tensor, shape in self.shapes.items():
            self._expect(self._context.set_input_shape(tensor, shape), f"does not take {tensor} {list(shape)}")
        self.dtypes = _dtypes(loaded.engine)
        for tensor, dtype in self.dtypes.items():
            shape = self.shapes.setdefault(tensor, tuple(self._context.get_tensor_shape(tensor)))
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.memories[tensor] = given[tensor] if tensor in given else loaded.device.memory(size)
            self._expect(
                self._context.set_tensor_address(tensor, self.memories[tensor].address), f"takes no address of {tensor}"
            )
        self._ran = False

    def fill(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        for tensor, array in arrays.items():
            self._stream.upload(self.memories[tensor], array.astype(self.dtypes[tensor], copy=False))

    def run(self) -> None:
        """Ask for it; done when the stream is."""
        self._expect(self._context.execute_async_v3(self._stream.handle), "did not run")
        if not self._ran:
            self._ran = True
            self._stream.wait()
            self._loaded.contexts.ran()

    @property
    def can_be_captured(self) -> bool:
        """Once it has run. TensorRT-RTX knows contexts that it cannot replay; TensorRT refuses while it captures."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return self._ran and (asked is None or bool(asked(self._stream.handle)))

    def _expect(self, done: bool, otherwise: str) -> None:
        if not done:
            raise EngineError(f"{self._name} {otherwise}: {self._loaded.why()}")


def load(library: Any, plan: Plan, place: Device, contexts: Contexts, graph: Path) -> Loaded:
    """Read a plan to the device. Raises EngineError."""
    place.use()
    listener = listener_of(library)
    listener.error = ""
    runtime = library.Runtime(listener.logger)
    if plan.key.flags.get(plans.VERSION_COMPATIBLE):
        runtime.engine_host_code_allowed = True  # such a plan brings the part of TensorRT that runs it
    with plan.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    loaded = Loaded(plan, engine, place, listener, contexts)
    if engine is None:
        raise EngineError(f"{plan.path} cannot be read: {loaded.why()}: run bksdm-build again")
    if plan.key.flags.get(plans.STRIPPED):
        refitter = library.Refitter(engine, listener.logger)
        parser = library.OnnxParserRefitter(refitter, listener.logger)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise EngineError(f"{plan.path} does not take the weights of {graph}: {loaded.why()}")
    if plan.key.flags.get(plans.WEIGHT_STREAMING):
        with _BUDGETS:  # of what is free now: one engine after the other
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return loaded


def _dtypes(engine: Any) -> dict[str, str]:
    names = [cast(str, engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
    types = {name: cast(str, engine.get_tensor_dtype(name).name) for name in names}
    return {name: _DTYPES.get(dtype, dtype) for name, dtype in types.items()}


def specs(library: Any, engine: Any, mode: Any) -> list[TensorSpec]:
    """A plan's own inputs or outputs; an axis without a fixed size is text."""
    return [
        TensorSpec(name, dtype, tuple(size if size >= 0 else "dynamic" for size in engine.get_tensor_shape(name)))
        for name, dtype in _dtypes(engine).items()
        if engine.get_tensor_mode(name) == mode
    ]


def outside(name: str, plan: Plan, shapes: Mapping[str, Sequence[int]]) -> str:
    """What to say of shapes that no profile of a plan holds."""
    asked = ", ".join(f"{tensor} {'x'.join(str(size) for size in shape)}" for tensor, shape in shapes.items())
    held = " or ".join(
        ", ".join(f"{tensor} {span}" for tensor, span in profile.items()) for profile in plan.key.profiles
    )
    return f"{name}: the engine takes {held}, was given {asked}: build one that takes it, see bksdm-build --help"
