"""A CUDA device through its driver's own interface (cuda-bindings): memory, copies, kernels and CUDA graphs.

What a call refuses is a DeviceError; whoever runs a graph says which graph it was.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import cuda.bindings.driver  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.devices import cuda_devices
from bksdm_runtime.engine import EngineError

driver = cast(Any, cuda.bindings.driver)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] - Cython

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: such a stream waits for no other
THREADS = 256  # of a kernel's block


class DeviceError(Exception):
    """The driver refused a call; the message names the call and the driver's own code."""


class Device:
    """The first CUDA device that this process may use. sm: its compute capability, as 8.9; name: its model's."""

    def __init__(self) -> None:
        if not cuda_devices():
            raise EngineError("this backend needs a CUDA device and NVIDIA's driver, and found none here")
        self._driver = driver
        self._modules: dict[bytes, Any] = {}
        _call("cuInit", 0)
        self._device = _call("cuDeviceGet", 0)
        self._context = _call("cuDevicePrimaryCtxRetain", self._device)
        attributes = driver.CUdevice_attribute
        major, minor = (
            _call("cuDeviceGetAttribute", attribute, self._device)
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.sm = f"{major}.{minor}"
        name: bytes = _call("cuDeviceGetName", 256, self._device)
        self.name = name.split(b"\0")[0].decode(errors="replace").strip()

    def use(self) -> None:
        """Have this thread's calls mean this device: a thread begins without one."""
        _call("cuCtxSetCurrent", self._context)

    def give_back(self, function: str, what: Any) -> None:
        """For finalizers: a refusal has no one to hear it, and the process may be ending."""
        self._driver.cuCtxSetCurrent(self._context)
        getattr(self._driver, function)(what)

    def memory(self, size: int) -> Memory:
        """So many bytes, filled with zeros: what lies there else may be NaN."""
        return Memory(self, size)

    def kernels(self, ptx: bytes, *names: str) -> list[Any]:
        """Functions of a module in PTX, compiled by the driver for this GPU, once."""
        self.use()
        if ptx not in self._modules:
            self._modules[ptx] = _call("cuModuleLoadData", ptx + b"\0")
        return [_call("cuModuleGetFunction", self._modules[ptx], name.encode()) for name in names]


@cache
def device() -> Device:
    """The device, once a process. Raises EngineError without one, DeviceError where it does not start."""
    return Device()


class Memory:
    """Bytes on the device, given back with this object. address: the device's own."""

    def __init__(self, owner: Device, size: int) -> None:
        owner.use()
        self.size = max(size, 1)
        self.address = int(_call("cuMemAlloc", self.size))
        self._given_back = weakref.finalize(self, owner.give_back, "cuMemFree", self.address)
        _call("cuMemsetD8", self.address, 0, self.size)
        _call("cuStreamSynchronize", 0)  # it goes by the default stream, for which ours do not wait


class HostMemory:
    """Floats on the host that the device writes to on its own while the host goes on. array: a view of them."""

    def __init__(self, owner: Device, shape: Sequence[int]) -> None:
        owner.use()
        count = int(np.prod(shape))
        self.address = int(_call("cuMemHostAlloc", count * 4, 0))
        self._given_back = weakref.finalize(self, owner.give_back, "cuMemFreeHost", self.address)
        floats = (ctypes.c_float * count).from_address(self.address)
        self.array: NDArray[np.float32] = np.ndarray(tuple(shape), np.float32, cast(Any, floats))


class Stream:
    """An order of work on the device: what is asked of one stream is done one after the other, later."""

    def __init__(self, owner: Device) -> None:
        owner.use()
        self.device = owner
        self._stream = _call("cuStreamCreate", _NON_BLOCKING)
        self._given_back = weakref.finalize(self, owner.give_back, "cuStreamDestroy", self._stream)

    @property
    def handle(self) -> int:
        return int(self._stream)

    def upload(self, target: Memory, array: NDArray[np.generic]) -> None:
        """The array may be changed at once: of pageable memory the driver takes a copy before it returns."""
        ready = np.ascontiguousarray(array)
        if ready.nbytes > target.size:
            raise ValueError(f"{ready.nbytes} bytes do not fit {target.size}")
        _call("cuMemcpyHtoDAsync", target.address, ready.ctypes.data, ready.nbytes, self._stream)

    def download(self, source: Memory, target: HostMemory) -> None:
        """Returns before the target is written: see `done`."""
        _call("cuMemcpyDtoHAsync", target.address, source.address, target.array.nbytes, self._stream)

    def fetch(self, source: Memory, shape: Sequence[int], dtype: str) -> NDArray[np.generic]:
        """A new array of what lies there when all that was asked before is done."""
        array = np.empty(shape, dtype)
        _call("cuMemcpyDtoHAsync", array.ctypes.data, source.address, array.nbytes, self._stream)
        self.wait()
        return array

    def copy(self, source: Memory, target: Memory, size: int, offset: int = 0) -> None:
        """So many bytes from `offset` of the source to the start of the target."""
        _call("cuMemcpyDtoDAsync", target.address, source.address + offset, size, self._stream)

    def launch(self, kernel: Any, threads: int, *arguments: Memory | int) -> None:
        """Run a kernel with at least so many threads; memories are given as their addresses, whole numbers as int."""
        values = tuple(one.address if isinstance(one, Memory) else one for one in arguments)
        types = tuple(ctypes.c_void_p if isinstance(one, Memory) else ctypes.c_int for one in arguments)
        block = min(threads, THREADS)
        blocks = -(-threads // block)
        _call("cuLaunchKernel", kernel, blocks, 1, 1, block, 1, 1, 0, self._stream, (values, types), 0)

    def wait(self) -> None:
        _call("cuStreamSynchronize", self._stream)

    def done(self) -> Event:
        """To wait for all that has been asked so far, and for no more."""
        return Event(self.device, self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` asks of this stream, as one CUDA graph and not done now.

        Raises DeviceError, and what `work` raises.
        """
        # Relaxed: the collector of garbage may give memory back meanwhile, which the other modes forbid.
        _call("cuStreamBeginCapture", self._stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            work()
        except BaseException:
            driver.cuStreamEndCapture(self._stream)
            raise
        return Graph(self.device, _call("cuStreamEndCapture", self._stream))

    def replay(self, graph: Graph) -> None:
        _call("cuGraphLaunch", graph.executable, self._stream)


class Event:
    """A place in a stream."""

    def __init__(self, owner: Device, stream: Any) -> None:
        self._event = _call("cuEventCreate", 2)  # CU_EVENT_DISABLE_TIMING
        self._given_back = weakref.finalize(self, owner.give_back, "cuEventDestroy", self._event)
        _call("cuEventRecord", self._event, stream)

    def wait(self) -> None:
        _call("cuEventSynchronize", self._event)


class Graph:
    """What a stream was asked for once, to be asked for again in one call."""

    def __init__(self, owner: Device, captured: Any) -> None:
        try:
            self.executable = _call("cuGraphInstantiate", captured, 0)
        finally:
            _call("cuGraphDestroy", captured)
        self._given_back = weakref.finalize(self, owner.give_back, "cuGraphExecDestroy", self.executable)


def _call(function: str, *arguments: Any) -> Any:
    code, *values = getattr(driver, function)(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{function}: {code.name}")
    return values[0] if values else None
