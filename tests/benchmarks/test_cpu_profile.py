"""The profile of a graph on OpenVINO, as a command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_profile.py"


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_the_demos_operations_add_up(component: str) -> None:
    pytest.importorskip("openvino")
    command = [sys.executable, str(SCRIPT), "--component", component, "--size", "64", "--calls", "1", "--threads", "1"]
    ended = subprocess.run([*command, "--arithmetic", "f32"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert re.match(rf"{component}: \d+ ms a call\n", ended.stdout)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.stdout.splitlines()[4:]]
    assert "Convolution" in {kind for kind, *_ in rows}
    assert {arithmetic for _, arithmetic, *_ in rows} <= {"f32", ""}
    assert sum(float(share.rstrip("%")) for *_, share in rows) == pytest.approx(100, abs=1)
