"""A stand-in for TensorRT and the CUDA driver: memory of this process for a device's, plans that ONNX Runtime runs."""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bksdm_runtime import bundle as bundles
from bksdm_runtime import plans, step_table
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.plans import EngineKey, Machine, Plan, Range
from bksdm_runtime.request import Request

HERE = Machine("tensorrt", "11.4.0.106", "8.9", "NVIDIA L4")
ON_HOST = EngineSettings(backend="onnxruntime", threads=1)
ON_PLANS = EngineSettings(backend="tensorrt", threads=1)
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
