"""Freed memory is kept: the second step of a training does not ask the kernel again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
sys.path.insert(0, {path!r})
import torch
from bksdm_training.allocator import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
def faults():
    torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # the heap grows by some of these first
    before = faults()
for _ in range(10):
    after = faults()
print(after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc: its malloc is what is set")
def test_memory_that_was_freed_is_not_asked_for_again():
    path = next(path for path in sys.path if path.endswith("training"))
    faults = {}
    for kept in (True, False):
        program = PROGRAM.format(path=path, kept=kept)
        ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        faults[kept] = int(ended.stdout)
    assert faults[True] < 1000 < 100_000 < faults[False]  # measured 0 and 163,850: every page of each, ten times
