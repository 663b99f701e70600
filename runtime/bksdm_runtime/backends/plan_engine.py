"""Plans of TensorRT and TensorRT-RTX on a device: what backends trt.py and rtx.py have in common, which is nearly all.

While a picture is drawn, latents and the sampler's table stay on the device; an evaluation and the step after it are
one CUDA graph, and the next one is asked for before the host has looked at what this one gave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime import plans
from bksdm_runtime.backends.device import DeviceError, Event, Stream, device
from bksdm_runtime.backends.loaded_plan import Bound, Loaded, Part, load, specs
from bksdm_runtime.backends.plan_loop import Loop
from bksdm_runtime.bundle import Bundle, BundleError
from bksdm_runtime.contract import Component
from bksdm_runtime.engine import Engine, EngineError, EngineSettings
from bksdm_runtime.evaluations import Evaluation, plan_evaluations
from bksdm_runtime.plans import Machine
from bksdm_runtime.schedule import Schedule
from bksdm_runtime.step_table import is_stepped, step_table
from bksdm_runtime.tensors import check_tensors, run_error, to_caller, to_graph

Array = NDArray[np.float32]

# Each has an execution context, whose memory is the largest that its plan may need.
_KEPT_SHAPES, _KEPT_LOOPS = 4, 2


class PlanEngine:
    """One plan on the device; what a call takes and gives says `engine.Engine`, what it holds `engine.Bounded`."""

    def __init__(
        self, name: str, component: Component, loaded: Loaded, settings: EngineSettings, arithmetic: str
    ) -> None:
        self.name = name
        self.component = component
        self.backend = settings.backend
        self.arithmetic = arithmetic
        self.threads = 1  # which waits for the device
        self.loaded = loaded
        self.part = Part(name, component, loaded)
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
        except (DeviceError, TypeError, RuntimeError) as error:  # as in open_plan
            raise run_error(self.name, ready, error, str(error)) from error
        return to_caller(arrays)

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        return self.loaded.plan.key.profile_for(shapes) is not None

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Bound:
        """The plan at these shapes, kept for the next call. Raises EngineError where it was not built for them."""
        key = tuple(sorted(shapes.items()))
        if key not in self._bound:
            while len(self._bound) >= _KEPT_SHAPES:
                self._bound.popitem(last=False)  # before there is another: as many in memory as are kept
            self._bound[key] = Bound(self.part, shapes, {}, self.stream)
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
        except (DeviceError, TypeError, RuntimeError) as error:  # as in open_plan
            raise run_error(self.name, {"latents": x, "context": context}, error, str(error)) from error

    def _loop(self, latents: tuple[int, ...], context: tuple[int, ...], shallow: PlanEngine | None) -> Loop:
        """One that no picture is being drawn with. What two of them compute at once is kept apart."""
        wanted = None if shallow is None else shallow.part
        for loop in self._idle:
            if (loop.latents_shape, loop.context_shape, loop.shallow) == (latents, context, wanted):
                self._idle.remove(loop)
                return loop
        del self._idle[: max(0, len(self._idle) - _KEPT_LOOPS + 1)]  # before there is another
        return Loop(self.part, latents, context, wanted)


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
        here = Machine(settings.backend, str(library.__version__), place.sm, place.name)
        plan = plans.find(bundle, component, here)
        plans.verify(plan)
        facts = bundle.manifest.components[component]
        names = {spec.name for spec in facts.inputs}
        if not plan.key.profiles or any(set(profile) != names for profile in plan.key.profiles):
            raise EngineError(f"engine key of {plan.path} has other inputs than {component}: run bksdm-build again")
        loaded = load(library, plan, place, contexts(plan, settings), bundle.component_path(component))
        for side, promised, mode in (
            ("input", facts.inputs, library.TensorIOMode.INPUT),
            ("output", facts.outputs, library.TensorIOMode.OUTPUT),
        ):
            check_tensors(component, side, promised, specs(library, loaded.engine, mode), narrowed=True)
        kind = PlanUNet if component == "unet" and is_stepped(facts) else PlanEngine
        return kind(component, facts, loaded, settings, arithmetic)
    except BundleError as error:
        raise EngineError(str(error)) from error
    # TypeError: what the bindings raise where a library gives no object, as on an old driver. RuntimeError: what
    # cuda-bindings raises where the driver lacks a function.
    except (DeviceError, TypeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise EngineError(f"backend {settings.backend!r} does not start: {reason}") from error
