"""The kernel between two steps: compiled by NVRTC, its source run on the CPU; that a GPU runs it: `make gpu-check`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bksdm_export import step_kernel
from bksdm_runtime import step_table
from bksdm_runtime.schedule import make_schedule
from tests.runtime.standin import (
    KERNELS,
    advance,
)


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
