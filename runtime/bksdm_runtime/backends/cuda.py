"""ONNX Runtime's CUDA provider (backend "cuda").

While a picture is drawn, latents and the sampler's table stay on the device: between two U-Net evaluations runs a small
graph (walk.py), and only the latents after a step come to the host."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.backends import ort
from bksdm_runtime.backends.buffers import Bound, Numbers, Place, on_host, run_options
from bksdm_runtime.backends.ort import (
    Provider,
    Session,
    arithmetic_of,
    check_session,
    first_line,
    open_session,
    session_options,
    threads_of,
)
from bksdm_runtime.backends.walk import Walk
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import DEEP, Component
from bksdm_runtime.engine import Engine, EngineError, EngineSettings
from bksdm_runtime.evaluations import Evaluation, plan_evaluations
from bksdm_runtime.schedule import Schedule
from bksdm_runtime.step_table import is_stepped
from bksdm_runtime.tensors import run_error, to_caller, to_graph

Array = NDArray[np.float32]

# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
_OPTIONS: Mapping[str, str] = {
    "use_tf32": "0",  # on by default, and 10 bits of mantissa: not the fp32 that a bundle's parity promises
    # The default, EXHAUSTIVE, times the algorithms and may choose another each run (onnxruntime issue 19822).
    "cudnn_conv_algo_search": "HEURISTIC",
}
# What is captured as a CUDA graph cannot be let go of: a graph's first shapes are, and keep their buffers; of those
# after them the last few do. Between evaluations a pair of shapes takes two graphs, with next to no memory.
_CAPTURED, _KEPT, _STEPS_CAPTURED = 16, 4, 64
_CALLS = -1  # the lane of calls, which must not touch the buffers of a picture that is being drawn

log = logging.getLogger(__name__)

CUDA = Place(Provider("CUDAExecutionProvider", {**_OPTIONS, "enable_cuda_graph": "1"}), "cuda", captures=True)


class CudaEngine:
    """One graph on the device; see `engine.Engine` for what a call takes and gives."""

    def __init__(
        self, name: str, component: Component, session: Session, place: Place, settings: EngineSettings, arithmetic: str
    ) -> None:
        self.name = name
        self.component = component
        self.backend = settings.backend
        self.arithmetic = arithmetic
        self.threads = threads_of(settings)
        self._session = cast(Any, session)
        self._place = place
        self._dtypes = {spec.name: spec.dtype for spec in component.inputs}
        self._outputs = [spec.name for spec in component.outputs]
        self._captured: dict[tuple[object, ...], Bound] = {}
        self._passing: OrderedDict[tuple[object, ...], Bound] = OrderedDict()
        self._numbers = Numbers(place, _CAPTURED)

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ready = to_graph(self.name, self.component, inputs)
        try:
            bound = self.bind({name: array.shape for name, array in ready.items()})
            bound.fill(ready)
            bound.run()
            arrays = {name: on_host(value) for name, value in bound.outputs.items()}
        except Exception as error:  # the library's own exceptions share no base class
            raise run_error(self.name, ready, error, first_line(error)) from error
        return to_caller(arrays)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any] | None = None, lane: int = _CALLS
    ) -> Bound:
        """Buffers for inputs of these shapes. given: other graphs' buffers, read in place. lane: whose they are; what
        two lanes compute at once is kept apart."""
        key = (lane, *sorted(shapes.items()), *(id(value) for value in (given or {}).values()))
        if key in self._captured:
            return self._captured[key]
        if key not in self._passing:
            number = self._numbers.next()
            if number is None and len(self._passing) >= _KEPT:
                self._passing.popitem(last=False)  # before there are others: as many in memory as are kept, no more
            inputs = {
                name: given[name] if given and name in given else self._buffer(shape, self._dtypes[name])
                for name, shape in shapes.items()
            }
            bound = Bound(self._session, inputs, self._found_outputs(inputs), number)
            if number is not None:
                self._captured[key] = bound
                return bound
            self._passing[key] = bound
        self._passing.move_to_end(key)
        return self._passing[key]

    def _found_outputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs where the library puts them itself, in one run that is for their shapes alone."""
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._place.device)
        self._session.run_with_iobinding(binding, run_options(None))
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _buffer(self, shape: Sequence[int], dtype: str) -> Any:
        """On the device, filled with zeros: what lies there else may be NaN."""
        return self._place.buffer(np.zeros(shape, dtype))


class CudaUNet(CudaEngine):
    """A U-Net that walks from noise to latents without leaving the device; see `engine.Sampler`."""

    def __init__(
        self, name: str, component: Component, session: Session, place: Place, settings: EngineSettings, arithmetic: str
    ) -> None:
        super().__init__(name, component, session, place, settings, arithmetic)
        self._walks: OrderedDict[tuple[int, tuple[int, ...]], Walk] = OrderedDict()
        self._steps_numbers = Numbers(place, _STEPS_CAPTURED)
        self._lanes: set[int] = set()  # of pictures that are being drawn

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
        lane = next(number for number in count() if number not in self._lanes)
        self._lanes.add(lane)
        try:
            loop = self._plan(planned, x.shape, context, shallow, lane)
            walk = self._walk(x.shape, lane)
            walk.start(schedule, x, np.ones(len(x), f) if guidance is None else guidance)
            loop[0].bound.fill(self._first_inputs(schedule, x, loop[0].bound))
            for i, (timestep, now) in enumerate(zip(schedule.timesteps, loop, strict=True)):
                if now.copied is not None:  # from guided to unguided: the prompts' half, which stands last
                    now.bound.fill({DEEP: now.copied.numpy()[-now.bound.inputs[DEEP].shape()[0] :]})
                now.bound.run()
                latents = walk.step(now.bound, loop[min(i + 1, len(loop) - 1)].bound)
                yield float(timestep), latents
        except EngineError:
            raise
        except Exception as error:  # the library's own exceptions share no base class
            raise run_error(self.name, {"latents": x, "context": context}, error, first_line(error)) from error
        finally:
            self._lanes.discard(lane)

    def _plan(
        self,
        planned: Sequence[Evaluation],
        latents: tuple[int, ...],
        context: Array,
        shallow: Engine | None,
        lane: int,
    ) -> list[_Evaluated]:
        """What each evaluation runs, its context filled in. Raises EngineError where `shallow` is of another kind."""
        if shallow is not None and not (
            isinstance(shallow, CudaEngine) and self._dtypes.items() <= shallow._dtypes.items()
        ):
            raise EngineError(
                f"{self.name} and the shallow U-Net differ in backend ({self.backend}, {shallow.backend}) or in dtypes"
            )
        loop: list[_Evaluated] = []
        deep: Any = None  # the buffer that holds the newest deep features
        for now in planned:
            rows = 2 * latents[0] if now.guided else latents[0]
            shapes: dict[str, tuple[int, ...]] = {
                "sample": (rows, *latents[1:]),
                "timestep": (rows,),
                "encoder_hidden_states": (rows, *context.shape[1:]),
            }
            before = loop[-1].bound if loop else None
            if now.full or shallow is None:
                bound = self.bind(shapes, lane=lane)
                deep, copied = bound.outputs.get(DEEP), None
            elif before is not None and before.inputs.get(DEEP) is deep:  # it reads what it was given a copy of
                bound, copied = before, None
            else:
                found = tuple(deep.shape())
                shapes[DEEP] = (rows, *found[1:])
                shared = found[0] == rows
                bound = shallow.bind(shapes, {DEEP: deep} if shared else {}, lane)
                deep, copied = bound.inputs[DEEP], None if shared else deep
            loop.append(_Evaluated(bound, copied))
        half = self._dtypes["encoder_hidden_states"]
        for bound in {id(one.bound): one.bound for one in loop}.values():
            rows = bound.inputs["encoder_hidden_states"].shape()[0]
            bound.fill({"encoder_hidden_states": context[len(context) - rows :].astype(half)})
        return loop

    def _first_inputs(self, schedule: Schedule, x: Array, bound: Bound) -> dict[str, NDArray[np.generic]]:
        rows = bound.inputs["sample"].shape()[0]
        scaled = np.tile(x * np.float32(schedule.input_scale[0]), (rows // len(x), 1, 1, 1))
        return {
            "sample": scaled.astype(self._dtypes["sample"]),
            "timestep": np.full(rows, schedule.timesteps[0], np.float32),
        }

    def _walk(self, latents: tuple[int, ...], lane: int) -> Walk:
        key = lane, latents
        if key not in self._walks:
            while len(self._walks) >= _CAPTURED:
                self._walks.popitem(last=False)
            self._walks[key] = Walk(self._step, self._place, latents, self._steps_numbers)
        self._walks.move_to_end(key)
        return self._walks[key]

    @cached_property
    def _step(self) -> Any:
        """The session of the graph between two evaluations."""
        graph = Path(__file__).with_name(f"step_{self._dtypes['sample']}.onnx")
        options = ort.library.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # its few nodes run on the device
        options.enable_mem_pattern = False
        return open_session("step", str(graph), self.backend, self._place.provider, options)


@dataclass(frozen=True)
class _Evaluated:
    """copied: a buffer whose last rows are to be copied into the deep features before it runs."""

    bound: Bound
    copied: Any


def open_component(bundle: Bundle, component: str, settings: EngineSettings, place: Place = CUDA) -> CudaEngine:
    """Open one component of the bundle. Raises EngineError."""
    arithmetic = arithmetic_of(bundle, settings)
    if place.device == "cuda":
        _preload_cuda()
    path = str(bundle.fused_path(component))
    facts = bundle.manifest.components[component]
    session = open_session(
        component, path, settings.backend, place.provider, session_options(threads_of(settings), bundle)
    )
    check_session(component, facts, session)
    kind = CudaUNet if component == "unet" and is_stepped(facts) else CudaEngine
    return kind(component, facts, session, place, settings, arithmetic)


_PRELOADING = Lock()  # components are opened side by side, and redirect_stdout changes what all threads print to


def _preload_cuda() -> None:
    """Load CUDA and cuDNN where pip put them (ONNX Runtime 1.21 and later), which the loader itself never searches.

    What it cannot load is no error yet: the system may have it elsewhere, and the provider tells when it starts.
    """
    preload = getattr(ort.library, "preload_dlls", None)
    if preload is not None:
        with _PRELOADING:
            _preload(preload)


@cache  # once a process
def _preload(preload: Callable[[], None]) -> None:
    said = io.StringIO()
    with redirect_stdout(said):  # it prints, and stdout carries paths
        preload()
    if said.getvalue().strip():
        log.info("%s", said.getvalue().strip())
