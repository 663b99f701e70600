"""The TensorRT backends on a stand-in: a driver whose device is this process's memory, plans that ONNX Runtime runs.

What this does not show: TensorRT, the CUDA driver and a GPU, that plans are right, and how fast any of it is (`make
gpu-check`). That the stand-in has the names and parameters of the real libraries is tested below.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from bksdm_export import step_kernel
from bksdm_runtime import bundle as bundles
from bksdm_runtime import engine as engines
from bksdm_runtime import plans, step_table
from bksdm_runtime.backends import device, plan_engine, rtx
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.engine import EngineError, EngineSettings, MissingBackend, Sampler
from bksdm_runtime.pipeline import Pipeline, Step, check, sample
from bksdm_runtime.plans import EngineKey, Machine, Plan, Range
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import SAMPLERS, make_schedule

HERE = Machine("tensorrt", "11.4.0.106", "8.9", "NVIDIA L4")
ON_HOST = EngineSettings(backend="onnxruntime", threads=1)
ON_PLANS = EngineSettings(backend="tensorrt", threads=1)
PLAIN = Request("a red apple", "grey", seed=3, steps=6, guidance_scale=7.5, height=64, width=128)
ROWS, SIDES = (1, 2, 8), (4, 8, 128)


# --- the stand-in: the CUDA driver -----------------------------------------------------------------------------------


class Driver:
    """Memory of this process for a device's.

    A stream does nothing until it is waited for; then it does all that it was asked, also what was asked after the
    event that is waited for: a device may be that slow, and that fast. The default stream, for which the others do not
    wait, is the latest of all.
    """

    WITHOUT_A_DEVICE = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuDeviceGetAttribute",
                        "cuDeviceGetName")  # fmt: skip

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.asked: dict[int, list[Callable[[], None]]] = {0: []}
        self.captured: tuple[int, list[Callable[[], None]]] | None = None
        self.current = threading.local()
        self.replayed = 0
        self.modules = 0
        self.fails: str | None = None
        self.CUresult = enum.Enum("CUresult", ["CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_VALUE"])
        attributes = ["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"]
        self.CUdevice_attribute = enum.Enum("CUdevice_attribute", attributes)
        self.CUstreamCaptureMode = enum.Enum("CUstreamCaptureMode", ["CU_STREAM_CAPTURE_MODE_RELAXED"])

    def _done(self, *values: Any) -> tuple[Any, ...]:
        caller = sys._getframe(1).f_code.co_name
        assert caller in self.WITHOUT_A_DEVICE or getattr(self.current, "context", None), f"{caller} without a device"
        if self.fails == caller:
            return (self.CUresult["CUDA_ERROR_OUT_OF_MEMORY"], *(None for _ in values))
        return (self.CUresult["CUDA_SUCCESS"], *values)

    def later(self, stream: int, work: Callable[[], None]) -> None:
        if self.captured is not None and self.captured[0] == stream:
            self.captured[1].append(work)
        else:
            self.asked[stream].append(work)

    def _finish(self, stream: int) -> None:
        assert self.captured is None or self.captured[0] != stream, "a stream that is captured cannot be waited for"
        for one in (stream, 0):
            while self.asked[one]:
                self.asked[one].pop(0)()

    def inside(self, address: int, size: int) -> None:
        inside = any(start <= address and address + size <= start + len(block) for start, block in self.blocks.items())
        assert inside, f"{size} bytes at {address:#x} are in no block of memory"

    def _copy(self, target: int, source: int, size: int, stream: int, *device: int) -> None:
        assert self.captured is None, "copies are not captured"
        for address in device:
            self.inside(address, size)
        self.later(stream, lambda: ctypes.memmove(target, source, size) and None)

    def cuInit(self, Flags: int) -> Any:  # noqa: N802, N803 - the driver's own names, here and below
        return self._done()

    def cuDeviceGet(self, ordinal: int) -> Any:  # noqa: N802
        return self._done(ordinal)

    def cuDeviceGetName(self, length: int, dev: int) -> Any:  # noqa: N802
        return self._done(HERE.gpu.encode().ljust(length, b"\0"))

    def cuDevicePrimaryCtxRetain(self, dev: int) -> Any:  # noqa: N802
        return self._done("context")

    def cuCtxSetCurrent(self, ctx: object) -> Any:  # noqa: N802
        self.current.context = ctx
        return self._done()

    def cuDeviceGetAttribute(self, attrib: enum.Enum, dev: int) -> Any:  # noqa: N802
        return self._done(8 if attrib.name.endswith("MAJOR") else 9)

    def cuMemAlloc(self, bytesize: int) -> Any:  # noqa: N802
        block = (ctypes.c_uint8 * bytesize)()
        ctypes.memset(block, 0xFF, bytesize)  # NaN in every floating-point type, as stale memory may be
        self.blocks[ctypes.addressof(block)] = block
        return self._done(ctypes.addressof(block))

    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> Any:  # noqa: N802, N803
        address = self.cuMemAlloc(bytesize)[1]
        return self._done(address)

    def cuMemFree(self, dptr: int) -> Any:  # noqa: N802
        for stream in list(self.asked):  # the driver waits for the device
            self._finish(stream)
        del self.blocks[dptr]
        return self._done()

    def cuMemFreeHost(self, p: int) -> Any:  # noqa: N802
        self.cuMemFree(p)
        return self._done()

    def cuMemsetD8(self, dstDevice: int, uc: int, N: int) -> Any:  # noqa: N802, N803
        self.later(0, lambda: ctypes.memset(dstDevice, uc, N) and None)
        return self._done()

    def cuMemcpyHtoDAsync(self, dstDevice: int, srcHost: int, ByteCount: int, hStream: int) -> Any:  # noqa: N802, N803
        taken = ctypes.create_string_buffer(ctypes.string_at(srcHost, ByteCount), ByteCount)  # at once, if pageable
        self.inside(dstDevice, ByteCount)
        assert self.captured is None, "copies are not captured"
        self.later(hStream, lambda: ctypes.memmove(dstDevice, taken, ByteCount) and None)
        return self._done()

    def cuMemcpyDtoHAsync(self, dstHost: int, srcDevice: int, ByteCount: int, hStream: int) -> Any:  # noqa: N802, N803
        self._copy(dstHost, srcDevice, ByteCount, hStream, srcDevice)
        return self._done()

    def cuMemcpyDtoDAsync(  # noqa: N802
        self,
        dstDevice: int,  # noqa: N803
        srcDevice: int,  # noqa: N803
        ByteCount: int,  # noqa: N803
        hStream: int,  # noqa: N803
    ) -> Any:
        self._copy(dstDevice, srcDevice, ByteCount, hStream, dstDevice, srcDevice)
        return self._done()

    def cuModuleLoadData(self, image: bytes) -> Any:  # noqa: N802
        assert image.endswith(b"\0")
        self.modules += 1
        return self._done(image.decode())

    def cuModuleGetFunction(self, hmod: str, name: bytes) -> Any:  # noqa: N802
        assert f".entry {name.decode()}(" in hmod
        return self._done(KERNELS[name.decode()])

    def cuLaunchKernel(  # noqa: N802
        self,
        f: Callable[..., None],
        gridDimX: int,  # noqa: N803
        gridDimY: int,  # noqa: N803
        gridDimZ: int,  # noqa: N803
        blockDimX: int,  # noqa: N803
        blockDimY: int,  # noqa: N803
        blockDimZ: int,  # noqa: N803
        sharedMemBytes: int,  # noqa: N803
        hStream: int,  # noqa: N803
        kernelParams: Any,  # noqa: N803
        extra: int,
    ) -> Any:
        values, types = kernelParams
        for value, kind in zip(values, types, strict=True):
            if kind is ctypes.c_void_p:
                self.inside(value, 4)
        assert f is not advance or gridDimX == 1, "advance is one block"
        self.later(hStream, lambda: f(gridDimX * blockDimX, *values))
        return self._done()

    def cuStreamCreate(self, Flags: int) -> Any:  # noqa: N802, N803
        assert Flags == 1, "a stream that waits for the default one"
        handle = len(self.asked)
        self.asked[handle] = []
        return self._done(handle)

    def cuStreamDestroy(self, hStream: int) -> Any:  # noqa: N802, N803
        return self._done()

    def cuStreamSynchronize(self, hStream: int) -> Any:  # noqa: N802, N803
        self._finish(hStream)
        return self._done()

    def cuStreamBeginCapture(self, hStream: int, mode: enum.Enum) -> Any:  # noqa: N802, N803
        if self.fails != "cuStreamBeginCapture":
            self.captured = hStream, []
        return self._done()

    def cuStreamEndCapture(self, hStream: int) -> Any:  # noqa: N802, N803
        assert self.captured is not None
        (_, recorded), self.captured = self.captured, None
        return self._done(recorded)

    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> Any:  # noqa: N802, N803
        return self._done(list(hGraph))

    def cuGraphLaunch(self, hGraphExec: Any, hStream: int) -> Any:  # noqa: N802, N803
        self.replayed += 1
        self.asked[hStream] += hGraphExec
        return self._done()

    def cuGraphDestroy(self, hGraph: Any) -> Any:  # noqa: N802, N803
        return self._done()

    def cuGraphExecDestroy(self, hGraphExec: Any) -> Any:  # noqa: N802, N803
        return self._done()

    def cuEventCreate(self, Flags: int) -> Any:  # noqa: N802, N803
        return self._done([0])

    def cuEventRecord(self, hEvent: list[int], hStream: int) -> Any:  # noqa: N802, N803
        hEvent[0] = hStream
        return self._done()

    def cuEventSynchronize(self, hEvent: list[int]) -> Any:  # noqa: N802, N803
        self._finish(hEvent[0])
        return self._done()

    def cuEventDestroy(self, hEvent: Any) -> Any:  # noqa: N802, N803
        return self._done()


def view(address: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def step_kernel_in_numpy(dtype: str) -> Callable[..., None]:
    """What step.cu says it does."""

    def step(threads: int, *arguments: int) -> None:
        out, latents, history, sample, table, guidance, index, rows, batch, size = arguments
        assert threads >= batch * size
        now = int(view(index, 1, dtype="int32")[0])
        row = view(table, step_table.MOST_EVALUATIONS, step_table.COLUMNS)[now]
        given = view(out, rows, size, dtype=dtype).astype(np.float32)
        output = given[rows - batch :]
        if rows > batch:
            output = given[:batch] + view(guidance, batch)[:, None] * (output - given[:batch])
        x, ring = view(latents, batch, size), view(history, step_table.PAST, batch, size)
        remembered = x * row[0] + output * row[1]
        following = x * row[2] + remembered * row[5]
        for past in range(1, step_table.PAST):
            if past <= now and row[5 + past] != 0:
                following = following + ring[(now - past) % step_table.PAST] * row[5 + past]
        ring[now % step_table.PAST], x[:] = remembered, following
        view(sample, 2, batch, size, dtype=dtype)[:] = following * row[3]

    return step


def advance(threads: int, timestep: int, table: int, index: int, rows: int) -> None:
    assert threads >= rows
    now = view(index, 1, dtype="int32")
    view(timestep, rows)[:] = view(table, step_table.MOST_EVALUATIONS, step_table.COLUMNS)[now[0], 4]
    now += 1


KERNELS = {
    "step_float32": step_kernel_in_numpy("float32"),
    "step_float16": step_kernel_in_numpy("float16"),
    "advance": advance,
}


# --- the stand-in: TensorRT ------------------------------------------------------------------------------------------


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT32", "INT64"])
_TYPES = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
}
_NUMPY = {DataType.FLOAT: "float32", DataType.HALF: "float16", DataType.INT32: "int32", DataType.INT64: "int64"}


class Library:
    """What the backends use of `tensorrt`. A plan is the path of the graph that ONNX Runtime runs."""

    __version__ = HERE.version
    ILogger, TensorIOMode, DataType = ILogger, TensorIOMode, DataType

    def __init__(self, driver: Driver) -> None:
        self.driver, self.contexts = driver, 0
        self.refuses = ""
        self.logger: Any = None

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802
        self.logger = self.logger or logger  # as the real one, which goes on with the first
        return Runtime(self, self.logger)


class Runtime:
    def __init__(self, library: Library, logger: Any) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        if not content.startswith(b"{"):
            self._logger.log(ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: magic tag does not match")
            self._logger.log(ILogger.Severity.ERROR, "what follows from that")
            return None
        return ICudaEngine(self._library, **json.loads(content))


class ICudaEngine:
    def __init__(self, library: Library, path: str, profiles: list[dict[str, list[list[int]]]]) -> None:
        self._library, self._profiles = library, profiles
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._tensors = {one.name: one for one in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        inputs = [one.name for one in self._session.get_inputs()]
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self._tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Sizes that are the same in all profiles are fixed, an output's too where all inputs' are."""
        fixed = {one: [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*(shape for profile in self._profiles
                 for shape in profile[one]), strict=True)] for one in self._profiles[0]}  # fmt: skip
        if name in fixed:
            return tuple(fixed[name])
        if any(-1 in shape for shape in fixed.values()):
            return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)
        return self._shapes_of(fixed)[name]

    def _shapes_of(self, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Of the outputs: found by a run."""
        zeros = {name: np.zeros(shape, _NUMPY[self.get_tensor_dtype(name)]) for name, shape in inputs.items()}
        names = [one.name for one in self._session.get_outputs()]
        return {name: array.shape for name, array in zip(names, self._session.run(names, zeros), strict=True)}

    def get_weight_streaming_automatic_budget(self) -> int:
        return 1 << 20

    def create_execution_context(self) -> IExecutionContext | None:
        if self._library.refuses == "context":
            return None
        self._library.contexts += 1
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._session, self._driver = engine, engine._session, engine._library.driver
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = self._engine._profiles[profile_index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._profile[name]
        self._shapes[name] = shape
        return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            self._shapes |= self._engine._shapes_of(self._shapes)
        return self._shapes[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._engine._library.refuses == "run":
            return False
        self._driver.later(stream_handle, self._run)
        return True

    def _run(self) -> None:
        def array(name: str) -> np.ndarray:
            shape, dtype = self._shapes[name], _NUMPY[self._engine.get_tensor_dtype(name)]
            self._driver.inside(self._addresses[name], int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return view(self._addresses[name], *shape, dtype=dtype)

        names = [one.name for one in self._session.get_outputs()]
        outputs = self._session.run(names, {one.name: array(one.name) for one in self._session.get_inputs()})
        for name, output in zip(names, outputs, strict=True):
            array(name)[:] = output


# --- what tests use --------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Backend tensorrt on the stand-in."""
    pretended = Driver()
    monkeypatch.setattr(device, "driver", pretended)
    for module in (device, engines):
        monkeypatch.setattr(module, "cuda_devices", lambda: 1)
    device.device.cache_clear()
    library = Library(pretended)
    pretended.library = library  # type: ignore[attr-defined]
    library.__spec__ = util.spec_from_loader("tensorrt", None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "bksdm_runtime.backends.trt", raising=False)
    yield pretended
    gc.collect()  # while the driver that gave memory is there to take it back
    device.device.cache_clear()
    sys.modules.pop("bksdm_runtime.backends.trt", None)


def profile_of(component: str) -> dict[str, Range]:
    """Of the toy bundle's graphs: up to four pictures with guidance, 32 to 1024 px."""

    def span(*middle: int, rows: tuple[int, int, int] = ROWS, sides: tuple[int, ...] = SIDES) -> Range:
        shapes = [(row, *middle, *([side] * 2 if sides else [])) for row, side in zip(rows, sides or rows, strict=True)]
        return Range(*shapes)

    one = (1, 1, 1)
    return {
        "text_encoder": {"input_ids": span(77, rows=one, sides=())},
        "vae_decoder": {"latent_sample": span(4, rows=one)},
        "vae_encoder": {"sample": span(3, rows=one, sides=(32, 64, 1024))},
        "unet": {"sample": span(4), "timestep": span(sides=()), "encoder_hidden_states": span(77, 16, sides=())},
        "unet_shallow": {
            "sample": span(4),
            "timestep": span(sides=()),
            "encoder_hidden_states": span(77, 16, sides=()),
            "deep_features": span(8),
        },
    }[component]


def build(folder: Path, machine: Machine = HERE, fixed: tuple[Request, ...] = (), **changes: Any) -> Path:
    """Write a plan of every component, as bksdm-build would. fixed: with a profile for each of these alone."""
    bundle = bundles.load(folder)
    for component in bundle.manifest.components:
        profiles: tuple[dict[str, Range], ...] = (profile_of(component),)
        if fixed:
            profiles = tuple(narrowed(profiles[0], request) for request in fixed)
        path = plans.key_path(bundle, machine, component)
        shapes = [{name: [span.smallest, span.fastest, span.largest] for name, span in one.items()} for one in profiles]
        content = json.dumps({"path": str(bundle.component_path(component)), "profiles": shapes}).encode()
        key = EngineKey(component, plans.graph_sha256(bundle, component), machine, profiles, {})
        plan = Plan(replace(key, **changes), path.with_suffix(".plan"), len(content), "", 1.5, 2**30)
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.path.write_bytes(content)
        path.write_text(replace(plan, sha256=bundles.file_sha256(plan.path)).to_json())
    return folder


def narrowed(profile: dict[str, Range], request: Request) -> dict[str, Range]:
    """A profile for guided pictures of the request's size alone, one at a time."""
    height, width = request.size
    rows = 2 if "timestep" in profile else 1

    def fixed(shape: tuple[int, ...]) -> Range:
        factor = 1 if shape[1:2] == (3,) else 8
        sides = (height // factor, width // factor) if len(shape) == 4 else shape[2:]
        chosen = (rows, *shape[1:2], *sides)
        return Range(chosen, chosen, chosen)

    return {name: fixed(span.smallest) for name, span in profile.items()}


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")))


def steps(pipeline: Pipeline, *requests: Request) -> list[tuple[float, np.ndarray]]:
    return [(item.timestep, item.latents) for item in pipeline.generate(requests) if isinstance(item, Step)]


def differ(one: Pipeline, other: Pipeline, *requests: Request) -> float:
    """The most that latents differ after any step, over the largest of them."""
    found, wanted = steps(one, *requests), steps(other, *requests)
    assert [timestep for timestep, _ in found] == [timestep for timestep, _ in wanted]
    pairs = list(zip(found, wanted, strict=True))
    return max(float(np.abs(got - want).max() / np.abs(want).max()) for (_, got), (_, want) in pairs)


CHANGES: dict[str, dict[str, Any]] = {
    **{sampler: {"sampler": sampler} for sampler in SAMPLERS},
    "one step": {"steps": 1},
    "pndm, 25 steps": {"steps": 25},
    "unguided": {"guidance_scale": 1.0},
    "guided in between": {"guidance_interval": (0.3, 0.8)},
    "another size": {"height": 128, "width": 64},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("driver")
def test_latents_are_those_of_the_loop_on_the_host(bundle: Path, changes: dict[str, Any]) -> None:
    request = replace(PLAIN, **changes)
    error = differ(Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST), request)
    assert error < 2e-6


@pytest.mark.usefixtures("driver")
def test_a_batch_an_init_image_and_one_picture_after_another(bundle: Path) -> None:
    picture = Image.new("RGB", (128, 64), (200, 30, 30))
    on_device, host = Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST)
    assert isinstance(on_device._engines["unet"], Sampler)
    batch = [replace(PLAIN, seed=seed, guidance_scale=scale) for seed, scale in ((1, 3.0), (2, 7.5), (3, 12.0))]
    drawn = replace(PLAIN, init_image=picture, strength=0.5, sampler="dpmsolver++")
    for requests in (batch, [drawn], [PLAIN], [replace(PLAIN, steps=3)], batch):
        assert differ(on_device, host, *requests) < 2e-6
    np.testing.assert_array_equal(on_device.draw([PLAIN])[0], host.draw([PLAIN])[0])


CACHED: dict[str, dict[str, Any]] = {
    "cached, guided": {"cache_interval": 3},
    "cached, guided at first": {"cache_interval": 2, "guidance_interval": (0.0, 0.5)},
    "cached, guided at last": {"cache_interval": 3, "guidance_interval": (0.5, 1.0)},
    "cached, unguided": {"cache_interval": 2, "guidance_scale": 1.0},
}


@pytest.mark.parametrize("changes", CACHED.values(), ids=CACHED)
@pytest.mark.usefixtures("driver")
def test_deep_features_stay_where_they_are(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = build(make_toy_bundle(tmp_path / "cached", step_cache=True))
    request = replace(PLAIN, steps=10, **changes)
    assert differ(Pipeline.open(folder, ON_PLANS), Pipeline.open(folder, ON_HOST), request) < 2e-6


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("cached", [False, True])
def test_engines_of_fixed_shapes_open_and_draw(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, cached: bool
) -> None:
    """As bksdm-build makes them by default: a plan's own shapes are then numbers, where bundle.json has names."""
    square = replace(PLAIN, width=64)
    folder = build(make_toy_bundle(tmp_path / "fixed", step_cache=cached), fixed=(PLAIN, square))
    on_device, host = Pipeline.open(folder, ON_PLANS), Pipeline.open(folder, ON_HOST)
    for request in (PLAIN, square):
        assert differ(on_device, host, replace(request, cache_interval=2 if cached else 1)) < 2e-6
        np.testing.assert_array_equal(on_device.draw([request])[0], host.draw([request])[0])
    one = build(make_toy_bundle(tmp_path / "one", step_cache=cached), fixed=(PLAIN,))
    assert differ(Pipeline.open(one, ON_PLANS), Pipeline.open(one, ON_HOST), PLAIN) < 2e-6


@pytest.mark.usefixtures("driver")
def test_half_precision_is_stepped_in_single(make_toy_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = build(make_toy_bundle(tmp_path / "half", dtype="float16"))
    on_device = Pipeline.open(folder, ON_PLANS)
    assert on_device.arithmetic == "f16"
    assert differ(on_device, Pipeline.open(folder, ON_HOST), replace(PLAIN, steps=25)) < 2e-6


def test_the_second_picture_only_replays(driver: Driver, bundle: Path) -> None:
    pipeline = Pipeline.open(bundle, ON_PLANS)
    first = pipeline.draw([PLAIN])[0]
    made, blocks = driver.library.contexts, len(driver.blocks)  # type: ignore[attr-defined]
    assert driver.replayed == 7  # PNDM's six steps
    for _ in range(20):
        np.testing.assert_array_equal(pipeline.draw([PLAIN])[0], first)
    assert (driver.library.contexts, driver.replayed) == (made, 7 * 21)  # type: ignore[attr-defined]
    gc.collect()
    assert len(driver.blocks) == blocks
    for size in range(64, 1024, 64):  # of many sizes a few are kept
        pipeline.draw([replace(PLAIN, height=size, width=size, steps=1)])
    assert driver.modules == 1
    gc.collect()
    gc.disable()
    try:
        del pipeline  # is enough: nothing waits for the collector
        assert not driver.blocks
    finally:
        gc.enable()


def test_without_cuda_graphs_the_picture_is_the_same(driver: Driver, bundle: Path) -> None:
    first = Pipeline.open(bundle, ON_PLANS).draw([PLAIN])[0]
    replayed, driver.fails = driver.replayed, "cuStreamBeginCapture"
    np.testing.assert_array_equal(Pipeline.open(bundle, ON_PLANS).draw([PLAIN])[0], first)
    assert driver.replayed == replayed


@pytest.mark.usefixtures("driver")
def test_two_pictures_drawn_at_once_are_kept_apart_and_one_may_be_left(bundle: Path) -> None:
    pipeline, host = Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST)
    other = replace(PLAIN, prompt="a green pear", seed=9)
    alone = [steps(host, PLAIN), steps(host, other)]
    both = [pipeline.generate([one]) for one in (PLAIN, other)]
    left = pipeline.generate([replace(PLAIN, seed=5)])
    next(left)
    for i in range(7):
        for run, wanted in zip(both, alone, strict=True):
            item = next(run)
            assert isinstance(item, Step)
            np.testing.assert_allclose(item.latents, wanted[i][1], rtol=0, atol=2e-6 * np.abs(wanted[i][1]).max())
    left.close()
    for run in both:
        run.close()
    assert differ(pipeline, host, PLAIN) < 2e-6


# --- what fits and what does not -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("driver")
def test_a_picture_that_the_engine_was_not_built_for_is_refused_before_anything_runs(bundle: Path) -> None:
    pipeline = Pipeline.open(bundle, ON_PLANS)
    expected = (
        rf"the engine of unet was not built for 1 picture at once of 128x1088 px: "
        rf"bksdm-build {bundle} --library tensorrt --add --height 1088 --width 128, or take another --backend"
    )
    with pytest.raises(EngineError, match=expected):
        pipeline.generate([replace(PLAIN, height=1088)])
    with pytest.raises(EngineError, match=r"for 5 pictures at once of 128x64 px.*--batch 5"):
        pipeline.generate([PLAIN] * 5, batch_size=5)
    batches = {item.positions for item in pipeline.generate([PLAIN] * 9) if isinstance(item, Step)}
    assert batches == {(0, 1, 2, 3), (4, 5, 6, 7), (8,)}  # eight rows at most
    tall = replace(PLAIN, height=1088, vae_tile=512)
    with pytest.raises(EngineError, match="the engine of unet was not built for 1 picture at once of 128x1088"):
        pipeline.generate([tall])


@pytest.mark.usefixtures("driver")
def test_whatever_a_picture_will_need_is_asked_before_it_is_begun(
    make_toy_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = build(make_toy_bundle(tmp_path / "cached", step_cache=True))
    opened = bundles.load(folder)
    pipeline = Pipeline.open(folder, ON_PLANS)
    picture = Image.new("RGB", (128, 64))
    wide = replace(PLAIN, width=320, vae_tile=192)
    pipeline.draw([replace(wide, cache_interval=2, init_image=picture)])
    for component, changes in (
        ("unet_shallow", {"cache_interval": 2}),
        ("vae_encoder", {"init_image": picture}),
    ):
        plans.key_path(opened, HERE, component).unlink()
        pipeline = Pipeline.open(folder, ON_PLANS)
        pipeline.draw([PLAIN])
        with pytest.raises(EngineError, match=f"has no engine of {component}"):
            pipeline.generate([replace(PLAIN, **changes)])
    one = build(make_toy_bundle(tmp_path / "one"), fixed=(wide,))
    with pytest.raises(
        EngineError, match=r"vae_decoder was not built for tiles of 192x64 px: .* --component vae_decoder --height"
    ):
        Pipeline.open(one, ON_PLANS).generate([wide])


@pytest.mark.usefixtures("driver")
def test_an_engine_for_guided_pictures_alone_says_how_to_get_the_others(toy_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    build(folder)
    opened = bundles.load(folder)
    path = plans.key_path(opened, HERE, "unet")
    plan = plans.read(path)
    two = {name: Range(*((2, *shape[1:]) for shape in (span.smallest, span.fastest, span.largest)))
           for name, span in plan.key.profiles[0].items()}  # fmt: skip
    path.write_text(replace(plan, key=replace(plan.key, profiles=(two,))).to_json())
    pipeline = Pipeline.open(folder, ON_PLANS)
    assert len(pipeline.draw([PLAIN, PLAIN])) == 2  # one after the other
    with pytest.raises(EngineError, match=r"for 1 picture at once of 128x64 px without guidance.*--unguided"):
        pipeline.generate([replace(PLAIN, guidance_scale=1.0)])


NEARLY: dict[str, tuple[Machine, dict[str, Any], str]] = {
    "another version": (
        replace(HERE, version="10.3.0"),
        {},
        r"engines/sm89-trt10\.3\.0-nvidia-l4 was built with TensorRT 10\.3\.0: run bksdm-build",
    ),
    "another compute capability": (replace(HERE, sm="8.6"), {}, "was built for SM 8.6"),
    "another GPU of the same": (replace(HERE, gpu="GeForce RTX 4090"), {}, r"was built for an GeForce RTX 4090"),
    "another platform": (replace(HERE, platform="linux-aarch64"), {}, "was built on linux-aarch64"),
    "another library": (
        replace(HERE, library="tensorrt-rtx"),
        {},
        "engines/sm89-rtx11.4.0.106-nvidia-l4 is for TensorRT-RTX",
    ),
    "other weights": (HERE, {"onnx": "0" * 64}, "was built from another graph or other weights"),
}


@pytest.mark.parametrize(("machine", "changes", "why"), NEARLY.values(), ids=NEARLY)
@pytest.mark.usefixtures("driver")
def test_an_engine_that_does_not_fit_is_not_run(
    toy_bundle: Path, tmp_path: Path, machine: Machine, changes: dict[str, Any], why: str
) -> None:
    folder = build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")), machine, **changes)
    with pytest.raises(EngineError, match=why) as caught:
        Pipeline.open(folder, ON_PLANS)
    assert "has no engine of" in str(caught.value)
    assert "for TensorRT 11.4.0.106 on SM 8.9 (NVIDIA L4)" in str(caught.value)


def test_the_profile_that_holds_the_least_besides_is_taken() -> None:
    wide, narrow = {"x": Range((1, 4), (2, 4), (8, 4))}, {"x": Range((2, 4), (2, 4), (2, 4))}
    key = EngineKey("unet", "a", HERE, (wide, narrow), {})
    assert [key.profile_for({"x": (rows, 4)}) for rows in (1, 2, 3, 9)] == [0, 1, 0, None]


def test_what_flags_let_an_engine_fit() -> None:
    key = EngineKey("unet", "a", Machine("tensorrt", "10.3.0", "8.6"), ({},), {})
    ampere = replace(key, flags={plans.HARDWARE: plans.AMPERE_AND_LATER})
    assert key.misfit("a", replace(key.machine, sm="8.9")) == "was built for SM 8.6"
    assert ampere.misfit("a", replace(key.machine, sm="8.9")) is None
    assert ampere.misfit("a", replace(key.machine, sm="12.0")) is None
    assert ampere.misfit("a", replace(key.machine, sm="7.5")) == "was built for SM 8.6"
    compatible = replace(key, flags={plans.VERSION_COMPATIBLE: True})
    assert compatible.misfit("a", replace(key.machine, version="10.13.0")) is None
    assert compatible.misfit("a", replace(key.machine, version="9.9.9")) == "was built with TensorRT 10.3.0"


def test_a_gpu_with_rtx_in_its_name_has_no_engines_of_tensorrt_rtx(bundle: Path) -> None:
    build(bundle, replace(HERE, gpu="NVIDIA GeForce RTX 4090"))
    opened = bundles.load(bundle)
    assert (len(plans.built(opened, "tensorrt")), plans.built(opened, "tensorrt-rtx")) == (8, [])


def test_the_own_gpus_engine_goes_before_that_of_its_compute_capability_and_that_before_others(bundle: Path) -> None:
    wide = replace(HERE, gpu="", sm="8.0")
    build(bundle, wide, flags={plans.HARDWARE: plans.AMPERE_AND_LATER})
    build(bundle, replace(HERE, gpu=""))
    opened = bundles.load(bundle)
    for machine in (HERE, replace(HERE, gpu=""), wide):
        assert plans.find(opened, "unet", HERE).key.machine == machine
        plans.key_path(opened, machine, "unet").unlink()
    with pytest.raises(BundleError, match="has no engine of unet"):
        plans.find(opened, "unet", HERE)


@pytest.mark.usefixtures("driver")
def test_batches_are_as_few_as_the_engine_was_built_for(toy_bundle: Path, tmp_path: Path) -> None:
    folder = build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")))
    opened = bundles.load(folder)
    path = plans.key_path(opened, HERE, "unet")
    plan = plans.read(path)

    def of(smallest: int, largest: int) -> dict[str, Range]:
        return {
            name: Range((smallest, *span.smallest[1:]), (largest, *span.fastest[1:]), (largest, *span.largest[1:]))
            for name, span in plan.key.profiles[0].items()
        }

    def split(count: int, *profiles: dict[str, Range]) -> list[int]:
        path.write_text(replace(plan, key=replace(plan.key, profiles=profiles)).to_json())
        pipeline = Pipeline.open(folder, ON_PLANS)
        asked = [replace(PLAIN, seed=seed) for seed in range(count)]
        [whole] = check(pipeline.bundle, asked, batch_size=16)[0]
        parts = pipeline._held(whole)
        assert [position for part in parts for position in part.positions] == list(range(count))
        return [len(part.requests) for part in parts]

    assert split(9, of(4, 16)) == [7, 2]  # and not 8 and 1, which is refused
    assert split(4, of(4, 4), of(6, 6)) == [2, 2]
    assert split(3, of(2, 2), of(8, 8)) == [1, 1, 1]
    assert split(3, of(16, 16)) == [1, 1, 1]  # each of which is refused, and so is the first
    with pytest.raises(EngineError, match="not built for 1 picture at once of 128x64 px: "):
        Pipeline.open(folder, ON_PLANS).generate([PLAIN] * 3)


@pytest.mark.usefixtures("driver")
def test_several_gpus_engines_lie_side_by_side(bundle: Path) -> None:
    build(bundle, replace(HERE, sm="8.6"))
    build(bundle, replace(HERE, version="10.3.0"))
    build(bundle, replace(HERE, gpu="another model"))
    build(bundle, replace(HERE, platform="linux-aarch64"))
    opened = bundles.load(bundle)
    assert len(plans.built(opened, "tensorrt")) == 20
    plans.key_path(opened, replace(HERE, sm="8.6"), "unet").write_text("{")  # another's damage hides nothing
    assert differ(Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST), PLAIN) < 2e-6


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plan": (lambda path: path.with_suffix(".plan").unlink(), r"unet\.plan cannot be read: No such file"),
    "half a plan": (
        lambda path: path.with_suffix(".plan").write_bytes(b"half"),
        r"has 4 bytes, its key says \d+: run bksdm-build again",
    ),
    "a changed plan": (
        lambda path: path.with_suffix(".plan").write_bytes(path.with_suffix(".plan").read_bytes()[::-1]),
        r"was changed or damaged \(sha256",
    ),
    "no JSON": (lambda path: path.write_text("{"), r"unet\.json: is not JSON"),
    "another schema": (
        lambda path: path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2')),
        r"schema version 2 is unknown",
    ),
    "a plan elsewhere": (
        lambda path: path.write_text(path.read_text().replace('"unet.plan"', '"../../unet.plan"')),
        "is not a path inside the bundle",
    ),
    "another input": (
        lambda path: path.write_text(path.read_text().replace('"timestep": {', '"time": {')),
        "has other inputs than unet: run bksdm-build again",
    ),
    "a nonsensical profile": (
        lambda path: path.write_text(json.dumps(_swapped(json.loads(path.read_text())))),
        "the fastest shape must lie between",
    ),
}


def _swapped(key: dict[str, Any]) -> dict[str, Any]:
    span = key["key"]["profiles"][0]["sample"]
    span["smallest"], span["largest"] = span["largest"], span["smallest"]
    return key


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.usefixtures("driver")
def test_a_damaged_engine_is_one_sentence(bundle: Path, damage: Callable[[Path], object], why: str) -> None:
    damage(plans.key_path(bundles.load(bundle), HERE, "unet"))
    with pytest.raises(EngineError, match=why):
        Pipeline.open(bundle, ON_PLANS)


def test_what_the_library_refuses_is_one_sentence(driver: Driver, bundle: Path) -> None:
    library = driver.library  # type: ignore[attr-defined]
    pipeline = Pipeline.open(bundle, ON_PLANS)
    for refuses, why in (("context", "no execution context"), ("run", "did not run: TensorRT says no more")):
        library.refuses = refuses
        with pytest.raises(EngineError, match=f"text_encoder:? {why}"):
            pipeline.draw([PLAIN])
    library.refuses, driver.fails = "", "cuMemAlloc"
    with pytest.raises(EngineError, match=r"text_encoder ran out of memory at input_ids \[1, 77\]"):
        Pipeline.open(bundle, ON_PLANS).draw([PLAIN])
    driver.fails = None
    path = plans.key_path(bundles.load(bundle), HERE, "unet")
    plan = plans.read(path)
    plan.path.write_bytes(b"no plan")
    path.write_text(replace(plan, bytes=7, sha256=bundles.file_sha256(plan.path)).to_json())
    with pytest.raises(EngineError, match=r"unet\.plan cannot be read: IRuntime::deserializeCudaEngine: magic tag"):
        Pipeline.open(bundle, ON_PLANS)
    build(bundle)
    for fails, why in (("cuStreamCreate", "cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY"), ("cuCtxSetCurrent", "cuCtx")):
        driver.fails = fails
        with pytest.raises(EngineError, match=f"backend 'tensorrt' does not start: {why}"):
            Pipeline.open(bundle, ON_PLANS)
    driver.fails = None
    library.Runtime = lambda logger: (_ for _ in ()).throw(TypeError("pybind11::init(): factory returned nullptr"))
    with pytest.raises(EngineError, match="does not start: pybind11::init"):
        Pipeline.open(bundle, ON_PLANS)


def test_a_stripped_plan_gets_its_weights_and_a_streamed_one_its_budget(driver: Driver, bundle: Path) -> None:
    library = driver.library  # type: ignore[attr-defined]
    fits = [True]
    read: list[str] = []
    library.Refitter = lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: True)
    library.OnnxParserRefitter = lambda refitter, logger: SimpleNamespace(
        refit_from_file=lambda path: read.append(path) or fits[0]
    )
    build(bundle, flags={plans.STRIPPED: True, plans.WEIGHT_STREAMING: True})
    opened = bundles.load(bundle)
    pipeline = Pipeline.open(bundle, ON_PLANS)
    assert {str(opened.component_path(name)) for name in ("unet", "text_encoder", "vae_decoder")} == set(read)
    unet: Any = pipeline._engines["unet"]
    assert unet.loaded.engine.weight_streaming_budget_v2 == 1 << 20
    fits[0] = False
    with pytest.raises(
        EngineError, match=r"unet\.plan does not take the weights of .*model\.onnx: TensorRT says no more"
    ):
        Pipeline.open(bundle, ON_PLANS)


@pytest.mark.usefixtures("driver")
def test_int8_and_another_arithmetic_are_refused(bundle: Path) -> None:
    with pytest.raises(EngineError, match="computes this bundle in f32, not in bf16"):
        Pipeline.open(bundle, replace(ON_PLANS, arithmetic="bf16"))
    opened = bundles.load(bundle)
    int8 = replace(opened, manifest=replace(opened.manifest, precision="int8"))
    with pytest.raises(EngineError, match="runs bundles of precision fp16 or fp32, and this is int8"):
        Pipeline.open(int8, ON_PLANS)


@pytest.mark.usefixtures("driver")
def test_auto_takes_tensorrt_where_the_bundle_has_engines(
    bundle: Path, toy_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="bksdm_runtime"):
        assert Pipeline.open(bundle).backend == "tensorrt"
        assert Pipeline.open(toy_bundle).backend in ("openvino", "onnxruntime")
    assert "tensorrt, because the bundle has engines for TensorRT and there is a CUDA device" in caplog.text
    assert "not tensorrt, because the bundle has no engines for it (see bksdm-build)" in caplog.text
    plans.key_path(bundles.load(bundle), HERE, "unet").write_text("{")
    assert Pipeline.open(bundle).backend in ("openvino", "onnxruntime")
    assert "a GPU is there, but backend tensorrt does not start: engine key" in caplog.text


def test_without_a_device_or_the_library_it_is_one_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingBackend, match=r"backend 'tensorrt' needs tensorrt: pip install 'bksdm\[tensorrt\]'"):
        Pipeline.open(bundle, ON_PLANS)
    device.device.cache_clear()
    monkeypatch.setattr(device, "cuda_devices", lambda: 0)
    with pytest.raises(EngineError, match="needs a CUDA device and NVIDIA's driver, and found none here"):
        Pipeline.open(bundle, replace(ON_PLANS, backend="tensorrt-rtx"))


# --- TensorRT-RTX ----------------------------------------------------------------------------------------------------


def test_what_rtx_compiles_is_kept_and_found_again(tmp_path: Path, bundle: Path) -> None:
    class Cache:
        def __init__(self) -> None:
            self.content = b""

        def serialize(self) -> bytes:
            return self.content

        def deserialize(self, blob: bytes) -> bool:
            self.content = blob
            return True

    class Config:
        def create_runtime_cache(self) -> Cache:
            return Cache()

        def set_runtime_cache(self, cache: Cache) -> bool:
            self.cache = cache
            return True

        dynamic_shapes_kernel_specialization_strategy: Any = None

    class Engine:
        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, config: Config) -> Config:
            return config

    plan = plans.read(plans.key_path(bundles.load(bundle), HERE, "unet"))
    wanted = EngineSettings(compiled_cache=tmp_path / "cache")
    first = rtx.RTXContexts(plan, wanted)
    made = first.new(Engine())
    assert made.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    made.cache.content = b"compiled"
    first.ran()
    assert rtx.RTXContexts(plan, wanted).new(Engine()).cache.content == b"compiled"
    assert rtx.RTXContexts(replace(plan, sha256="0"), wanted).new(Engine()).cache.content == b""
    rtx.RTXContexts(plan, EngineSettings()).ran()  # nothing is kept where nothing was asked for


# --- the kernel ------------------------------------------------------------------------------------------------------


def test_the_shipped_kernel_is_its_source_compiled() -> None:
    made = step_kernel.compile_source().rstrip(b"\0")
    assert step_kernel.COMPILED.read_bytes() == made
    assert (b"PAST 5 " in step_kernel.SOURCE.read_bytes(), step_table.PAST, step_table.COLUMNS) == (True, 5, 10)


@pytest.mark.parametrize("architecture", ["sm_60", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90"])
def test_the_kernel_compiles_to_the_end_for_a_gpu(architecture: str) -> None:
    assert len(step_kernel.compile_source(architecture)) > 5_000


HOST = """
#include <cstring>
#define KERNEL extern "C" void
static int THREAD;
static float from_half(unsigned short bits) { _Float16 h; std::memcpy(&h, &bits, 2); return (float)h; }
static unsigned short to_half(float value) {
    _Float16 h = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
extern "C" void set_thread(int number) { THREAD = number; }
#include "step.cu"
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [3, 6])
def test_the_kernels_source_does_what_the_stand_in_does(tmp_path: Path, dtype: str, rows: int) -> None:
    """The stand-in's kernels are numpy: here the source itself runs, a thread after the other."""
    (tmp_path / "host.cpp").write_text(HOST)
    command = ["g++", "-x", "c++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-I", str(step_kernel.FOLDER)]
    built = subprocess.run(
        [*command, "host.cpp", "-o", "host.so"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if "_Float16" in built.stderr:
        pytest.skip("this g++ has no _Float16")
    assert built.returncode == 0, built.stderr
    source = ctypes.CDLL(str(tmp_path / "host.so"))
    random, batch, size = np.random.default_rng(0), 3, 5
    config = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
              "beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1}  # fmt: skip
    schedule = make_schedule(config, steps=8, sampler="pndm", strength=None)
    memory = {
        "out": np.zeros((rows, size), dtype), "latents": random.normal(size=(batch, size)).astype(np.float32),
        "history": np.full((step_table.PAST, batch, size), np.nan, np.float32),
        "sample": np.zeros((2 * batch, size), dtype), "table": step_table.step_table(schedule, "tensorrt"),
        "guidance": np.array([1, 7.5, 12], np.float32), "index": np.zeros(1, np.int32),
    }  # fmt: skip
    timestep = np.zeros(2 * batch, np.float32)
    twin, twin_timestep = {name: array.copy() for name, array in memory.items()}, timestep.copy()

    def run(name: str, threads: int, *arguments: Any) -> None:
        for thread in range(threads):
            source.set_thread(thread)
            getattr(source, name)(*(ctypes.c_void_p(a) if a > 1 << 20 else ctypes.c_int(a) for a in arguments))

    for _ in schedule.timesteps:
        memory["out"][:] = twin["out"][:] = random.normal(size=(rows, size))
        addresses = [[array.ctypes.data for array in one.values()] for one in (memory, twin)]
        run(f"step_{dtype}", batch * size + 40, *addresses[0], rows, batch, size)
        KERNELS[f"step_{dtype}"](batch * size, *addresses[1], rows, batch, size)
        run("advance", 2 * batch + 9, timestep.ctypes.data, *addresses[0][4:7:2], 2 * batch)
        advance(2 * batch, twin_timestep.ctypes.data, *addresses[1][4:7:2], 2 * batch)
        for name, array in memory.items():
            np.testing.assert_array_equal(array, twin[name], err_msg=name)
        np.testing.assert_array_equal(timestep, twin_timestep)
    assert memory["index"][0] == len(schedule.timesteps)


# --- the stand-in against the real libraries -------------------------------------------------------------------------

LISTED = (Runtime, ICudaEngine, IExecutionContext)
# What is used besides, of an engine that streams or lacks its weights; of TensorRT-RTX alone.
BESIDES = {
    "Runtime": ["engine_host_code_allowed"],
    "ICudaEngine": ["weight_streaming_budget_v2", "get_weight_streaming_automatic_budget"],
    "Refitter": ["refit_cuda_engine"],
    "OnnxParserRefitter": ["refit_from_file"],
}
RTX_ALONE = {
    "ICudaEngine": ["create_runtime_config"],
    "IRuntimeConfig": [
        "create_runtime_cache",
        "set_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
    ],
    "IRuntimeCache": ["serialize", "deserialize"],
    "IExecutionContext": ["is_stream_capturable"],
}
DUMP = """
import json, sys
sys.path.insert(0, sys.argv[1])
library = __import__(sys.argv[2])
enums = {name: list(found.__members__) for name, found in (("Severity", library.ILogger.Severity),
         ("TensorIOMode", library.TensorIOMode), ("DataType", library.DataType))}
classes = {name: {one: getattr(found, one).__doc__ or "" for one in dir(found) if not one.startswith("_")}
           for name, found in vars(library).items() if isinstance(found, type)}
print(json.dumps({"version": library.__version__, "classes": classes, "enums": enums}))
"""
# Of TensorRT's libraries, which the bindings' wheel does not bring: what it takes of them, and their names.
TAKEN = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
LIBRARIES = ("libnvonnxparser.so", "libnvinfer_plugin.so", "libnvinfer.so")


def described(folder: Path, name: str) -> dict[str, Any]:
    """Classes, signatures and enumerations of real bindings, as a fresh process finds them."""
    done = subprocess.run(
        [sys.executable, "-c", DUMP, str(folder), name],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The bindings of TensorRT 11.4, made importable without its libraries, and those of TensorRT-RTX."""
    found = util.find_spec("tensorrt_bindings")
    assert found is not None
    assert found.origin is not None
    folder = tmp_path_factory.mktemp("bindings")
    copied = Path(shutil.copytree(Path(found.origin).parent, folder / "tensorrt_bindings"))
    content = (copied / "tensorrt.so").read_bytes()
    major = metadata.version("tensorrt-cu13-bindings").split(".")[0]
    # Names in the file's tables, of the same length: any function and any library will do, for none is called.
    for names, any_one in ((TAKEN, b"malloc"), ([f"{library}.{major}" for library in LIBRARIES], b"libc.so.6")):
        for name in names:
            wanted = b"\0" + name.encode() + b"\0"
            assert wanted in content, name
            content = content.replace(wanted, (b"\0" + any_one).ljust(len(wanted), b"\0"))
    (copied / "tensorrt.so").write_bytes(content)
    return {
        "TensorRT": described(folder, "tensorrt_bindings"),
        "TensorRT-RTX": described(folder, "tensorrt_rtx"),
    }


@pytest.mark.parametrize("library", ["TensorRT", "TensorRT-RTX"])
def test_the_stand_in_has_the_real_bindings_names_and_parameters(real: dict[str, dict[str, Any]], library: str) -> None:
    classes, enums = real[library]["classes"], real[library]["enums"]
    assert real["TensorRT"]["version"] == HERE.version
    for one in LISTED:
        for name, member in vars(one).items():
            if name.startswith("_"):
                continue
            documented = classes[one.__name__][name]
            if inspect.isfunction(member):
                for parameter in list(inspect.signature(member).parameters)[1:]:
                    assert f"{parameter}:" in documented, f"{one.__name__}.{name}({parameter})"
    for wanted in (BESIDES, *([RTX_ALONE] if library == "TensorRT-RTX" else [])):
        for name, members in wanted.items():
            assert set(members) <= classes[name].keys(), name
    assert [one.name for one in ILogger.Severity] == enums["Severity"]
    assert [one.name for one in TensorIOMode] == enums["TensorIOMode"]
    assert {one.name for one in DataType} <= set(enums["DataType"])


def test_the_stand_in_has_the_real_drivers_names_and_parameters() -> None:
    from cuda.bindings import driver as real_driver

    functions = [name for name in vars(Driver) if name.startswith("cu")]
    assert len(functions) > 25
    for name in functions:
        wanted = list(inspect.signature(getattr(real_driver, name)).parameters)
        assert list(inspect.signature(getattr(Driver, name)).parameters)[1:] == wanted, name
    pretended = Driver()
    for enumeration in ("CUresult", "CUdevice_attribute", "CUstreamCaptureMode"):
        members = {one.name for one in getattr(pretended, enumeration)}
        assert members <= getattr(real_driver, enumeration).__members__.keys()
    used = set(re.findall(r'"(cu[A-Z]\w+)"', Path(device.__file__).read_text()))
    assert used - {"cuStreamEndCapture"} <= set(functions)


@pytest.mark.usefixtures("driver")
def test_the_loop_takes_what_the_hosts_loop_takes() -> None:
    own = list(inspect.signature(plan_engine.PlanUNet.sample).parameters)[1:]
    assert own == list(inspect.signature(sample).parameters)[1:]
