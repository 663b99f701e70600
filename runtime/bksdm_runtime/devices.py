"""Which accelerators this machine has, asked of their driver without any inference library."""

from __future__ import annotations

import ctypes
import sys

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def cuda_devices() -> int:
    """How many CUDA devices this process may use (CUDA_VISIBLE_DEVICES is the driver's own business); 0 without one."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)):  # anything but 0 is an error
        return 0
    return count.value


def compute_capability() -> str | None:
    """That of the first CUDA device, as "8.9"; None without one."""
    driver = _driver()
    if driver is None or not cuda_devices():
        return None
    numbers: list[int] = []
    for attribute in (_MAJOR, _MINOR):
        value, device = ctypes.c_int(0), ctypes.c_int(0)
        if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetAttribute(
            ctypes.byref(value), attribute, device
        ):
            return None
        numbers.append(value.value)
    return ".".join(str(number) for number in numbers)


def device_name() -> str:
    """Model of the first CUDA device, as "NVIDIA L4"; "" without one."""
    driver = _driver()
    name, device = ctypes.create_string_buffer(256), ctypes.c_int(0)
    if driver is None or not cuda_devices() or driver.cuDeviceGet(ctypes.byref(device), 0):
        return ""
    return "" if driver.cuDeviceGetName(name, len(name), device) else name.value.decode(errors="replace").strip()


def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver
