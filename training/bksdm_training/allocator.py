"""How the C library gives memory to a training on a CPU."""

from __future__ import annotations

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process reuse what it freed, and tell whether that can be set here (glibc).

    By default glibc maps every large tensor anew and unmaps it again, and the kernel clears each of its pages each
    time: 6 % of a step of tiny at 256 px and batch 2, most of it in the backward pass, at the same peak of memory."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
