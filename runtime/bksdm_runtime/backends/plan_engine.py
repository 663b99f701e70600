"""Plans of TensorRT and TensorRT-RTX on a device: what backends trt.py and rtx.py have in common, which is nearly all.

While a picture is drawn, latents and the sampler's table stay on the device; an evaluation and the step after it are
one CUDA graph, and the next one is asked for before the host has looked at what this one gave."""

from __future__ import annotations

import logging
import mmap
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime import plans
from bksdm_runtime.backends.device import Device, DeviceError, Event, Graph, HostMemory, Memory, Stream, device
from bksdm_runtime.bundle import Bundle, BundleError
from bksdm_runtime.contract import DEEP, Component, TensorSpec
from bksdm_runtime.engine import Engine, EngineError, EngineSettings
from bksdm_runtime.evaluations import Evaluation, plan_evaluations
from bksdm_runtime.plans import Machine, Plan
from bksdm_runtime.schedule import Schedule
from bksdm_runtime.step_table import COLUMNS, MOST_EVALUATIONS, PAST, step_table
from bksdm_runtime.tensors import check_tensors, run_error, to_caller, to_graph

Array = NDArray[np.float32]

# Each has an execution context, whose memory is the largest that its plan may need.
_KEPT_SHAPES, _KEPT_LOOPS = 4, 2
_MOST_ROWS = 1024  # of a U-Net evaluation: `advance` is one block of threads

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}

log = logging.getLogger(__name__)


class Contexts(Protocol):
    """How a library makes execution contexts of a plan."""

    def new(self, engine: Any) -> Any: ...

    def ran(self) -> None:
        """One of them has run for the first time: what was compiled meanwhile can be kept."""
        ...


class Listener:
    """What a library says: to our log, and its last error for our own message."""

    def __init__(self, library: Any) -> None:
        listener = self
        self.error = ""
        severities = library.ILogger.Severity

        class Logger(library.ILogger):
            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                    listener.error = (message.strip().splitlines() or [""])[0][:300]
                log.debug("%s", message)

        self.logger: Any = Logger()


@dataclass(frozen=True)
class Loaded:
    """A plan on the device. engine: the library's own; listener: who hears what it says."""

    plan: Plan
    engine: Any
    device: Device
    listener: Listener
    contexts: Contexts

    def why(self) -> str:
        return self.listener.error or "TensorRT says no more"


class Bound:
    """A plan at one set of shapes: an execution context, and memories by name that stay where they are.

    given: memories of others to read or write in place of its own.
    """

    def __init__(
        self,
        name: str,
        loaded: Loaded,
        shapes: Mapping[str, Sequence[int]],
        given: Mapping[str, Memory],
        stream: Stream,
    ) -> None:
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


class PlanEngine:
    """One plan on the device; what a call takes and gives says `engine.Engine`, what it holds `engine.Bounded`."""

    def __init__(
        self, name: str, component: Component, loaded: Loaded, settings: EngineSettings, arithmetic: str
    ) -> None:
        self.name = name
        self.component = component
        self.backend = settings.backend
        self.arithmetic = arithmetic
        self.threads = settings.threads or 1  # it waits for the device with one
        self.loaded = loaded
        self.stream = Stream(loaded.device)
        self._bound: OrderedDict[tuple[object, ...], Bound] = OrderedDict()

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ready = to_graph(self.name, self.component, inputs)
        try:
            self.loaded.device.use()
            bound = self.bind({name: array.shape for name, array in ready.items()})
            bound.fill(ready)
            bound.run()
            arrays = {
                spec.name: self.stream.fetch(bound.memories[spec.name], bound.shapes[spec.name], spec.dtype)
                for spec in self.component.outputs
            }
        except DeviceError as error:
            raise run_error(self.name, ready, error, str(error)) from error
        return to_caller(arrays)

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        return self.loaded.plan.key.profile_for(shapes) is not None

    @property
    def most_rows(self) -> int:
        first = self.component.inputs[0].name
        return max(profile[first].largest[0] for profile in self.loaded.plan.key.profiles)

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Bound:
        """The plan at these shapes, kept for the next call. Raises EngineError where it was not built for them."""
        key = tuple(sorted(shapes.items()))
        if key not in self._bound:
            while len(self._bound) >= _KEPT_SHAPES:
                self._bound.popitem(last=False)  # before there is another: as many in memory as are kept
            self._bound[key] = Bound(self.name, self.loaded, shapes, {}, self.stream)
        self._bound.move_to_end(key)
        return self._bound[key]


class PlanUNet(PlanEngine):
    """A U-Net that walks from noise to latents without leaving the device; see `engine.Sampler`."""

    def __init__(
        self, name: str, component: Component, loaded: Loaded, settings: EngineSettings, arithmetic: str
    ) -> None:
        super().__init__(name, component, loaded, settings, arithmetic)
        self._idle: list[Loop] = []  # the newest last

    def sample(
        self,
        schedule: Schedule,
        noise: Array,
        context: Array,
        guidance: Array | None,
        clean: Array | None = None,
        *,
        evaluations: Sequence[Evaluation] | None = None,
        shallow: Engine | None = None,
    ) -> Generator[tuple[float, Array], None, None]:
        """`pipeline.sample` on the device: the same arguments, and the same latents but for the order of sums."""
        planned = evaluations or plan_evaluations(len(schedule.timesteps), guided=guidance is not None)
        f = np.float32
        x = noise * f(schedule.initial[1])
        if clean is not None:
            x = clean * f(schedule.initial[0]) + x
        if shallow is not None and not isinstance(shallow, PlanEngine):
            raise EngineError(
                f"{self.name} and the shallow U-Net differ in backend ({self.backend}, {shallow.backend})"
            )
        try:
            self.loaded.device.use()
            loop = self._loop(x.shape, context.shape[1:], shallow)
            try:
                scales = np.ones(len(x), f) if guidance is None else guidance
                loop.start(step_table(schedule, self.backend), float(schedule.timesteps[0]), x, context, scales)
                loop.scale_first(float(schedule.input_scale[0]), x)
                for now in dict.fromkeys(planned):  # what cannot run is refused before anything has
                    loop.stage(now)
                asked: tuple[float, int, Event] | None = None
                for i, (timestep, now) in enumerate(zip(schedule.timesteps, planned, strict=True)):
                    next_asked = float(timestep), i % 2, loop.step(now, i % 2)
                    if asked is not None:
                        yield asked[0], loop.latents(asked[1], asked[2])
                        self.loaded.device.use()  # the caller may have gone on in another thread
                    asked = next_asked
                if asked is not None:
                    yield asked[0], loop.latents(asked[1], asked[2])
            finally:
                self.loaded.device.use()
                loop.stream.wait()  # one that was cancelled may be under way
                self._idle = [*self._idle, loop][-_KEPT_LOOPS:]
        except DeviceError as error:
            raise run_error(self.name, {"latents": x, "context": context}, error, str(error)) from error

    def _loop(self, latents: tuple[int, ...], context: tuple[int, ...], shallow: PlanEngine | None) -> Loop:
        """One that no picture is being drawn with. What two of them compute at once is kept apart."""
        for loop in self._idle:
            if loop.latents_shape == latents and loop.context_shape == context and shallow in (None, loop.shallow):
                self._idle.remove(loop)
                return loop
        return Loop(self, latents, context, shallow)


@dataclass(frozen=True)
class Stage:
    """One kind of evaluation with the step after it. graph: of both, None where the context cannot be captured."""

    bound: Bound
    rows: int
    full: bool
    graph: Graph | None


class Loop:
    """The memories of a picture that is being drawn, of one size, and what runs on them.

    The next input always has 2 B rows, the latents twice: an unguided evaluation reads the first B of them.
    """

    def __init__(
        self, unet: PlanEngine, latents: tuple[int, ...], context: tuple[int, ...], shallow: PlanEngine | None
    ) -> None:
        self.unet, self.shallow = unet, shallow
        self.latents_shape, self.context_shape = latents, context
        self._batch, self._size = latents[0], int(np.prod(latents[1:]))
        if 2 * self._batch > _MOST_ROWS:
            raise EngineError(f"backend {unet.backend} takes at most {_MOST_ROWS // 2} pictures at once")
        self._dtypes = {spec.name: spec.dtype for spec in unet.component.inputs}
        place = unet.loaded.device
        self.stream = Stream(place)
        count, half = self._batch * self._size, np.dtype(self._dtypes["sample"]).itemsize
        self._latents, self._history = place.memory(4 * count), place.memory(4 * count * PAST)
        self._table = place.memory(4 * MOST_EVALUATIONS * COLUMNS)
        self._guidance, self._index = place.memory(4 * self._batch), place.memory(4)
        self._sample, self._timestep = place.memory(2 * half * count), place.memory(2 * 4 * self._batch)
        self._on_host = [HostMemory(place, latents) for _ in range(2)]
        self._step, self._advance = place.kernels(_ptx(), f"step_{self._dtypes['sample']}", "advance")
        self._stages: dict[tuple[bool, bool], Stage] = {}
        self._deep: dict[int, Memory] = {}  # by the rows of it
        self._newest_deep = 0  # of how many rows

    def start(self, table: Array, timestep: float, latents: Array, context: Array, guidance: Array) -> None:
        """Begin a picture. table: see step_table; context: [2B, 77, D], or [B, 77, D] unguided."""
        rows, upload = 2 * self._batch, self.stream.upload
        upload(self._table, table)
        upload(self._latents, np.ascontiguousarray(latents, np.float32))
        upload(self._guidance, np.ascontiguousarray(guidance, np.float32))
        upload(self._index, np.zeros(1, np.int32))
        upload(self._timestep, np.full(rows, timestep, np.float32))
        self._context = context
        for stage in self._stages.values():
            self._fill_context(stage)

    def scale_first(self, scale: float, latents: Array) -> None:
        twice = np.tile(latents * np.float32(scale), (2, 1, 1, 1))
        self.stream.upload(self._sample, twice.astype(self._dtypes["sample"]))

    def step(self, now: Evaluation, slot: int) -> Event:
        """Ask for an evaluation and the step after it, its latents into host memory `slot`."""
        stage = self.stage(now)
        if stage.full:
            self._newest_deep = stage.rows
        elif self._newest_deep != stage.rows:
            # From guided to unguided: the prompts' half, which stands last. The next one finds it there.
            source, target = self._deep[self._newest_deep], self._deep[stage.rows]
            self.stream.copy(source, target, target.size, source.size - target.size)
            self._newest_deep = stage.rows
        if stage.graph is not None:
            self.stream.replay(stage.graph)
        else:
            stage.bound.run()
            self._step_after(stage.bound, stage.rows)
        self.stream.download(self._latents, self._on_host[slot])
        return self.stream.done()

    def latents(self, slot: int, when: Event) -> Array:
        """A new array of what a step left in host memory `slot`."""
        when.wait()
        return np.array(self._on_host[slot].array)

    def stage(self, now: Evaluation) -> Stage:
        """What runs such an evaluation, made when it is first asked for. Raises EngineError."""
        full = now.full or self.shallow is None
        key = now.guided, full
        if key not in self._stages:
            engine = self.unet if full or self.shallow is None else self.shallow
            rows = self._batch * (2 if now.guided else 1)
            shapes: dict[str, tuple[int, ...]] = {
                "sample": (rows, *self.latents_shape[1:]),
                "timestep": (rows,),
                "encoder_hidden_states": (rows, *self.context_shape),
            }
            given = {"sample": self._sample, "timestep": self._timestep}
            deep = next((spec for spec in self.unet.component.outputs if spec.name == DEEP), None)
            if deep is not None:
                shape = (rows, *(axis for axis in deep.axes[1:2] if isinstance(axis, int)), *self.latents_shape[2:])
                size = int(np.prod(shape)) * np.dtype(deep.dtype).itemsize
                given[DEEP] = self._deep.setdefault(rows, self.unet.loaded.device.memory(size))
                if not full:
                    shapes[DEEP] = shape
            bound = Bound(engine.name, engine.loaded, shapes, given, self.stream)
            bound.run()  # on zeros: a context allocates in its first run, which no capture may hold
            graph = self._captured(bound, rows)
            self._stages[key] = Stage(bound, rows, full, graph)
            self._fill_context(self._stages[key])
        return self._stages[key]

    def _captured(self, bound: Bound, rows: int) -> Graph | None:
        if not bound.can_be_captured:
            return None

        def work() -> None:
            bound.run()
            self._step_after(bound, rows)

        try:
            return self.stream.capture(work)
        except (DeviceError, EngineError) as error:
            log.info("%s at %s rows is not captured as a CUDA graph: %s", self.unet.name, rows, error)
            return None

    def _step_after(self, bound: Bound, rows: int) -> None:
        tables = self._table, self._guidance, self._index
        self.stream.launch(
            self._step,
            self._batch * self._size,
            *(bound.memories["out_sample"], self._latents, self._history, self._sample, *tables),
            *(rows, self._batch, self._size),
        )
        self.stream.launch(self._advance, 2 * self._batch, self._timestep, self._table, self._index, 2 * self._batch)

    def _fill_context(self, stage: Stage) -> None:
        """The context of its rows: unguided, the prompts' half, which stands last."""
        if len(self._context) >= stage.rows:
            stage.bound.fill({"encoder_hidden_states": self._context[len(self._context) - stage.rows :]})


def outside(name: str, plan: Plan, shapes: Mapping[str, Sequence[int]]) -> str:
    """What to say of shapes that no profile of a plan holds."""
    asked = ", ".join(f"{tensor} {'x'.join(str(size) for size in shape)}" for tensor, shape in shapes.items())
    held = " or ".join(
        ", ".join(f"{tensor} {span}" for tensor, span in profile.items()) for profile in plan.key.profiles
    )
    return f"{name}: the engine takes {held}, was given {asked}: build one that takes it, see bksdm-build --help"


def open_plan(library: Any, bundle: Bundle, component: str, settings: EngineSettings, contexts: Any) -> PlanEngine:
    """Open the plan of a component that fits this machine. contexts: makes Contexts of (plan, settings).

    Raises EngineError.
    """
    arithmetic = {"fp16": "f16", "fp32": "f32"}.get(bundle.manifest.precision)
    if arithmetic is None:
        raise EngineError(
            f"backend {settings.backend!r} runs bundles of precision fp16 or fp32, and this is "
            f"{bundle.manifest.precision}: export one with --precision fp16"
        )
    if settings.arithmetic not in ("auto", arithmetic):
        raise EngineError(
            f"backend {settings.backend!r} computes this bundle in {arithmetic}, not in {settings.arithmetic}: "
            "leave the arithmetic at auto"
        )
    try:
        place = device()
        here = Machine(settings.backend, str(library.__version__), place.sm)
        plan = plans.find(bundle, component, here)
        plans.verify(plan)
    except DeviceError as error:
        raise EngineError(f"backend {settings.backend!r}: the CUDA device does not start: {error}") from error
    except BundleError as error:
        raise EngineError(str(error)) from error
    facts = bundle.manifest.components[component]
    loaded = _load(library, plan, place, contexts(plan, settings), bundle.component_path(component))
    check_tensors(component, "input", facts.inputs, _specs(library, loaded.engine, library.TensorIOMode.INPUT))
    check_tensors(component, "output", facts.outputs, _specs(library, loaded.engine, library.TensorIOMode.OUTPUT))
    kind = PlanUNet if component == "unet" and _is_stepped(facts) else PlanEngine
    return kind(component, facts, loaded, settings, arithmetic)


def _load(library: Any, plan: Plan, place: Device, contexts: Contexts, graph: Path) -> Loaded:
    """Read a plan to the device. Raises EngineError."""
    place.use()
    listener = Listener(library)
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
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return loaded


def _dtypes(engine: Any) -> dict[str, str]:
    names = [cast(str, engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
    types = {name: cast(str, engine.get_tensor_dtype(name).name) for name in names}
    return {name: _DTYPES.get(dtype, dtype) for name, dtype in types.items()}


def _specs(library: Any, engine: Any, mode: Any) -> list[TensorSpec]:
    """A plan's own inputs or outputs; an axis without a fixed size is text."""
    return [
        TensorSpec(name, dtype, tuple(size if size >= 0 else "dynamic" for size in engine.get_tensor_shape(name)))
        for name, dtype in _dtypes(engine).items()
        if engine.get_tensor_mode(name) == mode
    ]


def _is_stepped(unet: Component) -> bool:
    """Whether step.cu fits: timesteps in float32, and output and input alike. Else it is stepped on the host."""
    dtypes = {spec.name: spec.dtype for spec in (*unet.inputs, *unet.outputs)}
    return dtypes["timestep"] == "float32" and dtypes["sample"] == dtypes["out_sample"]


@cache
def _ptx() -> bytes:
    return Path(__file__).with_name("step.ptx").read_bytes()
