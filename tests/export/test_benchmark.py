"""benchmarks/export.py says by its exit code whether every export succeeded within its memory."""

from __future__ import annotations

import json
import os
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "benchmarks" / "export.py"))


def test_a_failed_export_is_exit_1(
    benchmark: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    assert benchmark["main"](["--variants", "huge", "--json", str(figures)]) == 1
    assert "failed with exit code 2" in capfd.readouterr().out
    [row] = json.loads(figures.read_text())["rows"]
    assert (row["variant"], row["exit_code"], row["ratio"]) == ("huge", 2, None)


@pytest.mark.parametrize(("ratio", "code"), [(2.19, 0), (2.2, 1), (3.0, 1)])
def test_an_export_over_the_bound_is_exit_1(
    benchmark: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: float, code: int
) -> None:
    row = benchmark["Row"]("tiny", 60.0, 0, 30.0, 10**9, int(ratio * 1e9), 10**9, ratio)
    benchmark["main"].__globals__["measure"] = lambda *_: row
    figures = tmp_path / "figures.json"
    assert benchmark["main"](["--variants", "tiny", "small", "--json", str(figures)]) == code
    lines = capsys.readouterr().out.splitlines()
    assert f"{len(os.sched_getaffinity(0))} usable cores" in lines[0]
    assert f"torch {version('torch')}, onnxruntime {onnxruntime.__version__}" in lines[0]
    assert ["over 2.2" in line for line in lines[2:]] == [bool(code)] * 2
    written = json.loads(figures.read_text())
    assert written["versions"]["onnxruntime"] == onnxruntime.__version__
    assert written["cores"] == len(os.sched_getaffinity(0))
    assert [one["ratio"] for one in written["rows"]] == [ratio, ratio]
