"""Threads are as many as the process may use, whatever the machine has."""

from __future__ import annotations

import os

from bksdm_runtime.cores import physical_cores


def test_physical_cores_respects_what_the_process_may_use() -> None:
    cores = physical_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        assert cores <= len(os.sched_getaffinity(0))
