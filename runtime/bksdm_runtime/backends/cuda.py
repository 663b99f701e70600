"""ONNX Runtime's CUDA provider (backend "cuda"). While a picture is drawn, latents and the sampler's table stay on the
device: between two U-Net evaluations runs a small graph (step_*.onnx, made by bksdm_export.step_graph), and nothing is
copied but what a caller looks at."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.backends import ort
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
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import DEEP, Component
from bksdm_runtime.engine import Engine, EngineError, EngineSettings
from bksdm_runtime.evaluations import Evaluation, plan_evaluations
from bksdm_runtime.schedule import Schedule
from bksdm_runtime.tensors import run_error, to_caller, to_graph

Array = NDArray[np.float32]

# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
_OPTIONS: Mapping[str, str] = {
    "use_tf32": "0",  # on by default, and 10 bits of mantissa: not the fp32 that a bundle's parity promises
    # The default, EXHAUSTIVE, times the algorithms and may choose another each run (onnxruntime issue 19822).
    "cudnn_conv_algo_search": "HEURISTIC",
}
# Shapes that buffers are kept for, and runs that are captured as CUDA graphs: what is captured cannot be let go of.
_KEPT, _CAPTURED = 4, 16
PAST = 5  # earlier outputs that step_*.onnx remembers
_COLUMNS = 5 + PAST
_MOST_EVALUATIONS = 1024  # room in the table: 1,000 steps, and PNDM's one more

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where sessions run and buffers lie. captures: whether a shape's kernels are replayed as one CUDA graph."""

    provider: Provider
    device: str
    captures: bool


CUDA = Place(Provider("CUDAExecutionProvider", {**_OPTIONS, "enable_cuda_graph": "1"}), "cuda", captures=True)


class Bound:
    """A graph at one set of shapes: buffers that stay where they are on the device, and the run that fills them.

    inputs, outputs: the library's OrtValues by name. number: of the CUDA graph that the run is captured as, if any.
    """

    def __init__(self, session: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], number: int | None) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        self._session = session
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = _run_options(number)

    def fill(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Copy arrays of the buffers' own dtypes and shapes into inputs."""
        for name, array in arrays.items():
            self.inputs[name].update_inplace(np.ascontiguousarray(array))

    def run(self) -> None:
        """Returns when the device is done."""
        self._session.run_with_iobinding(self._binding, self._options)


def _on_host(value: Any) -> NDArray[np.generic]:
    """A copy, also where the buffer lies on the host itself."""
    return np.array(value.numpy())


def _run_options(number: int | None) -> Any:
    options = ort.library.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1" if number is None else str(number))
    return options


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
        self._bound: OrderedDict[tuple[object, ...], Bound] = OrderedDict()
        self._numbers = _Numbers(place)

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ready = to_graph(self.name, self.component, inputs)
        try:
            bound = self.bind({name: array.shape for name, array in ready.items()})
            bound.fill(ready)
            bound.run()
            arrays = {name: _on_host(value) for name, value in bound.outputs.items()}
        except Exception as error:  # the library's own exceptions share no base class
            raise run_error(self.name, ready, error, first_line(error)) from error
        return to_caller(arrays)

    def bind(self, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any] | None = None) -> Bound:
        """Buffers for inputs of these shapes, the last few kept. given: other graphs' buffers, read in place."""
        key = (*sorted(shapes.items()), *(id(value) for value in (given or {}).values()))
        if key not in self._bound:
            inputs = {
                name: given[name] if given and name in given else self._buffer(shape, self._dtypes[name])
                for name, shape in shapes.items()
            }
            self._bound[key] = Bound(self._session, inputs, self._found_outputs(inputs), self._numbers.next())
            if len(self._bound) > _KEPT:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _found_outputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs where the library puts them itself, in one run that is for their shapes alone."""
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._place.device)
        self._session.run_with_iobinding(binding, _run_options(None))
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _buffer(self, shape: Sequence[int], dtype: str) -> Any:
        """On the device, filled with zeros: what lies there else may be NaN."""
        return ort.library.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._place.device, 0)


class CudaUNet(CudaEngine):
    """A U-Net that walks from noise to latents without leaving the device; see `engine.Sampler`."""

    def __init__(
        self, name: str, component: Component, session: Session, place: Place, settings: EngineSettings, arithmetic: str
    ) -> None:
        super().__init__(name, component, session, place, settings, arithmetic)
        self._walks: OrderedDict[tuple[int, ...], _Walk] = OrderedDict()

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
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in (("latents", x), ("context", context)))
        try:
            loop = self._plan(planned, x.shape, context, shallow)
            walk = self._walk(x.shape)
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
            raise EngineError(f"{self.name} failed at {shapes}: {first_line(error)}") from error

    def _plan(
        self, planned: Sequence[Evaluation], latents: tuple[int, ...], context: Array, shallow: Engine | None
    ) -> list[_Evaluated]:
        """What each evaluation runs, its context filled in."""
        loop: list[_Evaluated] = []
        deep: Any = None  # the buffer that holds the newest deep features
        for now in planned:
            rows = 2 * latents[0] if now.guided else latents[0]
            shapes: dict[str, tuple[int, ...]] = {
                "sample": (rows, *latents[1:]),
                "timestep": (rows,),
                "encoder_hidden_states": (rows, *context.shape[1:]),
            }
            if now.full or not isinstance(shallow, CudaEngine):
                bound = self.bind(shapes)
                deep, copied = bound.outputs.get(DEEP), None
            else:
                found = tuple(deep.shape())
                shapes[DEEP] = (rows, *found[1:])
                shared = found[0] == rows
                bound = shallow.bind(shapes, {DEEP: deep} if shared else {})
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

    def _walk(self, latents: tuple[int, ...]) -> _Walk:
        if latents not in self._walks:
            self._walks[latents] = _Walk(self._step, self._place.device, latents, self._numbers)
            if len(self._walks) > _KEPT:
                self._walks.popitem(last=False)
        self._walks.move_to_end(latents)
        return self._walks[latents]

    @cached_property
    def _step(self) -> Any:
        """The session of the graph between two evaluations."""
        graph = Path(__file__).with_name(f"step_{self._dtypes['sample']}.onnx")
        options = ort.library.SessionOptions()
        options.enable_mem_pattern = False
        return open_session("step", str(graph), self.backend, self._place.provider, options)


class _Numbers:
    """Numbers of CUDA graphs within a session; none past _CAPTURED, and none where nothing is captured."""

    def __init__(self, place: Place) -> None:
        self._left = _CAPTURED if place.captures else 0

    def next(self) -> int | None:
        if not self._left:
            return None
        self._left -= 1
        return _CAPTURED - self._left


@dataclass(frozen=True)
class _Evaluated:
    """copied: a buffer whose last rows are to be copied into the deep features before it runs."""

    bound: Bound
    copied: Any


class _Walk:
    """Latents and what is remembered of earlier outputs, in two sets of buffers: a step reads one and writes the other.

    They stay where they are from picture to picture, so that a captured graph stays right.
    """

    def __init__(self, session: Any, device: str, latents: tuple[int, ...], numbers: _Numbers) -> None:
        self._session = session
        self._batch = latents[0]
        self._numbers = numbers

        def zeros(*shape: int, dtype: str = "float32") -> Any:
            return ort.library.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)

        self._fixed = {
            "table": zeros(_MOST_EVALUATIONS, self._batch, _COLUMNS, 1, 1, 1),
            "guidance": zeros(self._batch, 1, 1, 1),
        }
        self._sets = [
            {
                "latents": zeros(*latents),
                "history": zeros(latents[0], PAST, *latents[1:]),
                "index": zeros(1, dtype="int64"),
            }
            for _ in range(2)
        ]
        self._turn = 0
        # The bounds beside each pair are those that it is made of: as long as they live, no other has their ids.
        self._pairs: dict[tuple[int, int], tuple[tuple[Bound, Bound], list[Bound]]] = {}

    def start(self, schedule: Schedule, latents: Array, guidance: Array) -> None:
        """Begin a picture. Raises EngineError where the schedule has more rows than there is room for."""
        if len(schedule.timesteps) > _MOST_EVALUATIONS:
            raise EngineError(f"{len(schedule.timesteps)} evaluations are too many: at most {_MOST_EVALUATIONS}")
        self._turn = 0
        self._fixed["table"].update_inplace(table(schedule, self._batch))
        self._fixed["guidance"].update_inplace(np.ascontiguousarray(guidance, np.float32)[:, None, None, None])
        first = self._sets[0]
        first["latents"].update_inplace(np.ascontiguousarray(latents, np.float32))
        first["history"].update_inplace(np.zeros(first["history"].shape(), np.float32))
        first["index"].update_inplace(np.zeros(1, np.int64))

    def step(self, source: Bound, target: Bound) -> Array:
        """From what a U-Net gave in `source` to what it is to read in `target`; the latents after it, a new array."""
        key = id(source), id(target)
        if key not in self._pairs:
            self._pairs[key] = (source, target), [self._bind(source, target, turn) for turn in range(2)]
        self._pairs[key][1][self._turn].run()
        self._turn = 1 - self._turn
        return cast(Array, _on_host(self._sets[self._turn]["latents"]))

    def _bind(self, source: Bound, target: Bound, turn: int) -> Bound:
        given, next_rows = source.outputs["out_sample"], target.inputs["sample"].shape()[0]
        rows = given.shape()[0]
        here, there = self._sets[turn], self._sets[1 - turn]
        on_cpu = {
            "negative_end": [self._batch],
            "positive_start": [rows - self._batch],
            "repeats": [next_rows // self._batch, 1, 1, 1],
        }
        small = {name: ort.library.OrtValue.ortvalue_from_numpy(np.array(v, np.int64)) for name, v in on_cpu.items()}
        return Bound(
            self._session,
            {"out_sample": given, **here, **self._fixed, **small},
            {
                **{f"next_{name}": value for name, value in there.items()},
                "sample": target.inputs["sample"],
                "timestep": target.inputs["timestep"],
            },
            self._numbers.next(),
        )


def table(schedule: Schedule, batch: int) -> Array:
    """The sampler's table as step_*.onnx reads it, [1024, B, 10, 1, 1, 1]: a row for each evaluation.

    Columns: factors of latents and of output in what is remembered; of latents; of the next input; the next timestep;
    of what is remembered, newest first. Rows past the schedule's are zero.
    """
    evaluations = len(schedule.timesteps)
    rows = np.zeros((_MOST_EVALUATIONS, _COLUMNS), np.float32)
    rows[:evaluations, :2] = schedule.keep
    rows[:evaluations, 2] = schedule.a
    rows[: evaluations - 1, 3] = schedule.input_scale[1:]
    rows[: evaluations - 1, 4] = schedule.timesteps[1:]
    rows[:evaluations, _COLUMNS - PAST : _COLUMNS - PAST + schedule.b.shape[1]] = schedule.b
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (_MOST_EVALUATIONS, batch, _COLUMNS)))[
        ..., None, None, None
    ]


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
    dtypes = {spec.name: spec.dtype for spec in facts.inputs}
    # The step's graph hands timesteps on as float32; a U-Net that takes others is stepped on the host.
    kind = CudaUNet if component == "unet" and dtypes["timestep"] == "float32" else CudaEngine
    return kind(component, facts, session, place, settings, arithmetic)


def _preload_cuda() -> None:
    """Load CUDA and cuDNN where pip put them (ONNX Runtime 1.21 and later), which the loader itself never searches.

    What it cannot load is no error yet: the system may have it elsewhere, and the provider tells when it starts.
    """
    preload = getattr(ort.library, "preload_dlls", None)
    if preload is None:
        return
    said = io.StringIO()
    with redirect_stdout(said):  # it prints, and stdout carries paths
        preload()
    if said.getvalue().strip():
        log.info("%s", said.getvalue().strip())
