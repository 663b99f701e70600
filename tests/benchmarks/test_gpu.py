"""benchmarks/gpu.py: its figures and its page, and our side on a CPU's buffers. What this does not show: a GPU."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bksdm_runtime import bundle as bundles
from bksdm_runtime.backends import cuda
from bksdm_runtime.backends.buffers import Place
from bksdm_runtime.backends.ort import CPU

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("gpu")


def result(seconds: float, unet: float = 0.005, **batches: float) -> dict[str, Any]:
    def one(took: float) -> dict[str, Any]:
        return {"seconds": [took, 2 * took, took], "stages": {"text": [0.001], "unet": [unet], "decode": [0.02]}}

    parts = {"1": one(seconds), **{name.removeprefix("of"): one(took) for name, took in batches.items()}}
    return {"opened": 1.0, "first_picture": 2.0, "batches": parts, "memory": 3 << 30, "versions": {"torch": "2"}}


def report(gpu: ModuleType, *rounds: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": {"size": 512, "steps": 25, "pictures": 3, "guidance": 7.5},
        "peak": {"flops": 500e12, "device": "a GPU"},
        "variants": {"tiny": {"work": {"guided_step": 1e12, "decode": 2.5e12, "macs": 2e11}, "rounds": list(rounds)}},
    }


def test_ratios_are_within_rounds_and_aims_are_judged(gpu: ModuleType) -> None:
    first = {gpu.OURS: result(0.1, of4=0.2), gpu.COMPILED: result(0.16), gpu.EAGER: {"failed": "out of memory"}}
    second = {gpu.OURS: result(0.2), gpu.COMPILED: result(0.28)}
    found = gpu.figures(report(gpu, first, second))
    mine = found["variants"]["tiny"]
    assert mine[gpu.COMPILED]["times_ours"] == pytest.approx([1.5, 1.4, 1.6])
    assert mine[gpu.EAGER] == {"failed": "out of memory"}
    assert mine[gpu.OURS]["1"]["share"] == pytest.approx(0.4)
    assert mine[gpu.OURS]["4"]["pictures_per_second"] == pytest.approx(20)
    assert [aim["met"] for aim in found["aims"].values()] == [True, True]
    slow = gpu.figures(report(gpu, {gpu.OURS: result(0.1, 0.02), gpu.COMPILED: result(0.1)}))
    assert [aim["met"] for aim in slow["aims"].values()] == [False, False]


def test_what_was_not_measured_meets_no_aim(gpu: ModuleType) -> None:
    found = gpu.figures(report(gpu, {gpu.OURS: {"failed": "no kernel"}}))
    assert [aim["met"] for aim in found["aims"].values()] == [False, False]
    assert "failed: no kernel" in importlib.import_module("gpu_page").tables(report(gpu, {}), found)


def test_the_page_says_what_its_report_says(gpu: ModuleType) -> None:
    page = importlib.import_module("gpu_page")
    written = json.loads((REPOSITORY / "docs" / "gpu-report.json").read_text())
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    between = text.split(page.BEGIN)[1].split(page.END)[0]
    assert between.strip() == page.tables(written, gpu.figures(written)).strip()
    assert (REPOSITORY / "docs" / page.CHART).is_file()


def test_our_side_draws_and_times_its_stages(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    contender = importlib.import_module("gpu_contender")
    place = Place(CPU, "cpu", captures=False)
    monkeypatch.setattr(cuda, "open_component", partial(cuda.open_component, place=place))
    monkeypatch.setattr(contender, "EVALUATIONS", 2)
    task = {
        "kind": "ours",
        "options": {"fused": False},
        "model": str(bundles.demo()),
        "prompt": "a red apple",
        "seed": 1,
        "steps": 2,
        "guidance": 7.5,
        "size": 64,
        "pictures": 2,
        "batches": [1, 2],
        "picture": str(tmp_path / "picture.npy"),
    }
    found = contender.measure(task)
    assert set(found["batches"]) == {"1", "2"}
    assert set(found["batches"]["2"]["stages"]) == {"text", "unet", "decode", "decode to pixels"}
    assert np.load(tmp_path / "picture.npy").shape == (64, 64, 3)
    assert gpu.line(found).count("pictures/s") == 1


def test_a_run_fails_where_ours_fails_or_draws_another_picture(gpu: ModuleType, tmp_path: Path) -> None:
    good = {gpu.OURS: {**result(0.1), "psnr": 41.0}, gpu.COMPILED: {**result(0.16), "psnr": 39.0}}

    def found(change: dict[str, Any]) -> list[str]:
        written = report(gpu, {**good, **change})
        return gpu.faults({**written, "figures": gpu.figures(written)})

    plain = "ours, without CUDA graphs"
    assert found({}) == []
    assert found({plain: {"failed": "no kernel"}}) == [f"tiny, {plain}: no kernel"]
    assert found({plain: {**result(0.2), "psnr": 12.3}}) == [f"tiny, {plain}: 12.3 dB to the picture of {gpu.EAGER}"]
    assert found({gpu.COMPILED: result(0.1)}) == ["a picture, times compiled diffusers"]
    grey = np.full((8, 8, 3), 100, np.uint8)
    np.save(tmp_path / "one.npy", grey)
    np.save(tmp_path / "other.npy", grey + 1)
    assert gpu._psnr(tmp_path / "one.npy", tmp_path / "other.npy") == pytest.approx(48.13, abs=0.01)
    assert gpu._psnr(tmp_path / "one.npy", tmp_path / "one.npy") == 120
    assert gpu._psnr(tmp_path / "one.npy", tmp_path / "none.npy") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "report.json")]) == 1
    assert capsys.readouterr().err.startswith("no GPU to measure: ")
    assert not (tmp_path / "report.json").exists()
