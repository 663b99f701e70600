"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Cores that this process may use, two hardware threads of one core counted once; a container's quota respected."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows: no affinity to respect
        return max(1, os.cpu_count() or 1)
    usable = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "200000 100000": microseconds of each period
    limit, _, period = quota.read_text().strip().partition(" ") if quota.is_file() else ("max", "", "")
    allowed = max(1, int(limit) // int(period)) if limit.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), allowed))
