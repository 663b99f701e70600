"""benchmarks/training.py: both of its sides learn the same, and its exit code says whether ours is fast enough."""

from __future__ import annotations

import importlib
import json
import os
import runpy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return runpy.run_path(str(REPOSITORY / "benchmarks" / "training.py"))


def _results(seconds: dict[str, float], losses: dict[str, dict[str, float]]) -> Any:
    def measure(task: dict[str, Any]) -> dict[str, Any]:
        side = task["side"]
        return {
            "seconds": [seconds.get(side, 1.0)] * 3,
            "cpu_seconds": [seconds.get(side, 1.0)] * 3,
            "losses": [{"task": 1.0, "output": 1.0, "feature": 4.0, "gradient_norm": 9.0, **losses.get(side, {})}] * 4,
            "peak": 10**9,
            "device_peak": None,
            "machine": {"device": "x", "threads": 1, "versions": {"torch": "2"}},
            "phases": {"backward": 0.5, "rest": 0.1} if task.get("profile") else {},
        }

    return measure


MINI = ["--size", "64", "--batch", "4", "--repetitions", "1", "--cache-dtype", "fp32"]


def _agree(written: dict[str, Any]) -> None:
    assert written["differences"]["losses"]["difference"] < 1e-6  # measured 1.2e-7
    assert written["differences"]["gradient_norm"]["difference"] < 1e-6  # measured 1.2e-7
    assert [len(result["losses"]) for side in ("published", "ours") for result in written["measured"][side]] == [4, 4]
    assert written["machine"]["versions"]["torch"] == version("torch")
    assert written["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_both_sides_have_the_same_losses(
    benchmark: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    contender = importlib.import_module("contender")
    inside = benchmark["main"].__globals__
    inside["measure"] = lambda task: asdict(contender.measure(contender.Task(**task)))  # a process each takes long
    inside["TARGETS"]["cpu"] = 0.01  # nothing here is large enough to be timed
    figures = tmp_path / "figures.json"
    assert benchmark["main"]([*MINI, "--teacher", str(trained / "checkpoint"), "--json", str(figures)]) == 0
    _agree(json.loads(figures.read_text()))


@pytest.mark.slow
def test_each_side_says_where_its_time_goes(benchmark: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    benchmark["main"].__globals__["TARGETS"]["cpu"] = 0.01
    figures = tmp_path / "figures.json"
    options = ["--profile", "--gradient-checkpointing", "--json", str(figures)]
    assert benchmark["main"]([*MINI, "--teacher", str(trained / "checkpoint"), *options]) == 0
    written = json.loads(figures.read_text())
    _agree(written)
    ours, published = (set(written["profiles"][side]) for side in ("ours", "published"))
    assert published - ours == {"autoencoder", "text encoder"}
    assert ours - published == set()
    assert {"teacher forward", "student forward", "backward", "optimizer", "average", "data"} < ours


@pytest.mark.parametrize(
    ("seconds", "losses", "code", "said"),
    [
        ({"published": 1.4}, {}, 0, "1.40 (1.40 to 1.40, 3 repetitions), target 1.3: reached"),
        ({"published": 1.2}, {}, 1, "target 1.3: MISSED"),
        ({"published": 1.4}, {"ours": {"output": 1.1}}, 1, "1.0e-01 (output, step 1), limit 5e-04: DIFFERENT"),
        ({"published": 1.4}, {"ours": {"gradient_norm": 9.9}}, 1, "(gradient_norm, step 1), limit 1e-02: DIFFERENT"),
        ({"published": 1.4}, {"ours": {"task": float("nan")}}, 1, "nan (task, step 1), limit 5e-04: DIFFERENT"),
    ],
)
def test_a_missed_target_or_another_loss_is_exit_1(
    benchmark: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    seconds: dict[str, float],
    losses: dict[str, dict[str, float]],
    code: int,
    said: str,
) -> None:
    benchmark["main"].__globals__["measure"] = _results(seconds, losses)
    assert benchmark["main"](["--size", "64", "--profile"]) == code
    assert said in capsys.readouterr().out


def test_a_side_that_fails_is_exit_1(
    benchmark: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert benchmark["main"](["--teacher", str(tmp_path / "none"), "--size", "64"]) == 1
    assert "cache failed with exit code 1" in capfd.readouterr().out


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--warmup", "0"], ["--precision", "fp16"], ["--device", "tpu"]])
def test_misuse_is_exit_2(benchmark: dict[str, Any], wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark["main"](wrong)
