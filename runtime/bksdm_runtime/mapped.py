"""Memory that a library keeps files mapped in, given back to the system once it has made its own copy of them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_DONTNEED = 4  # MADV_DONTNEED of Linux's <sys/mman.h>


def release(folder: Path) -> int:
    """Give back the pages of read-only mappings of files under `folder`; how many bytes are mapped so.

    Nothing is lost: what is read again comes from the file, or from the system's cache of it. Where the system is not
    Linux, nothing happens.
    """
    if sys.platform != "linux":
        return 0
    below = f"{folder.resolve()}/"
    released = 0
    try:
        mappings = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    for mapping in mappings:
        addresses, access, *_, path = mapping.split(maxsplit=5) if mapping.count(" ") >= 5 else ("", "", "")
        # Only what nobody can have written to: a private page that was written to would be lost.
        if not path.startswith(below) or access[:3] != "r--":
            continue
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED) == 0:
            released += end - begin
    return released
