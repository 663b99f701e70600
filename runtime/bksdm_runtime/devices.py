"""Which accelerators this machine has, asked of their driver without any inference library."""

from __future__ import annotations

import ctypes
import sys


def cuda_devices() -> int:
    """How many CUDA devices this process may use (CUDA_VISIBLE_DEVICES is the driver's own business); 0 without one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):  # anything but 0 is an error
        return 0
    return count.value
