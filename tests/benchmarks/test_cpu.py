"""benchmarks/cpu.py: the short form runs, a contender that cannot run is a row with its reason, figures and tables."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """module("cpu"): a file of benchmarks/, imported as it imports its siblings."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


@pytest.fixture
def cpu(module: Any) -> ModuleType:
    return module("cpu")


def _sample(seconds: float, *, peak: int = 10**9, first: float = 5.0) -> dict[str, Any]:
    step, decode = seconds / 10, seconds / 4
    drawn = {"batch": 1, "seconds": seconds, "cpu_seconds": seconds, "steps": [step], "text": None, "decode": decode}
    return {"first_step": first, "first_picture": 2 * first, "drawn": [drawn], "peak": peak, "versions": {"torch": "2"}}


def _contender(name: str, kind: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "exact": True,
        "aim": None,
        "twin": None,
        "arithmetic": "fp32",
        "skipped": None,
        "failed": None,
        "picture": "nowhere.png",
        "samples": [_sample(one) for one in seconds],
        "batches": None,
        **changes,
    }


def _written(**variants: list[dict[str, Any]]) -> dict[str, Any]:
    works = {"tiny": 971e9, "small": 1200e9, "sd-v1.4": 1600e9}
    return {
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 2, "memory": 2**34, "bf16": False},
        "task": {"size": 512, "steps": 5, "rounds": 3, "threads": 2},
        "peaks": [{"fp32": 200.0}, {"fp32": 194.2}],
        "variants": {
            name: {"work": {"guided_step": works[name], "decode": 2.5e12, "macs": 205e9}, "contenders": contenders}
            for name, contenders in variants.items()
        },
    }


def _no_machine(*_: str) -> dict[str, float]:
    """Instead of cpu_machine.py, which takes seconds."""
    return {"fp32": 100.0, "bf16": 100.0, "guided_step": 5e9, "decode": 2e9, "macs": 1e9}


def test_what_a_step_costs_is_counted_with_attention(module: Any) -> None:
    from bksdm.architecture import SD_V1_4

    machine = module("cpu_machine")
    counted = machine.work_of(SD_V1_4.unet, SD_V1_4.vae, 512)
    assert counted["macs"] == pytest.approx(338.6e9, rel=1e-3)  # what BK-SDM's authors publish: 338.7 G
    # Of batch 2, two operations a MAC, and attention's two products: 4 n m d for each layer and head, here by hand.
    products = 0
    for channels, tokens, layers in ((320, 64**2, 5), (640, 32**2, 5), (1280, 16**2, 5), (1280, 8**2, 1)):
        products += layers * 4 * tokens * (tokens + 77) * channels
    assert counted["guided_step"] == pytest.approx(4 * counted["macs"] + 2 * products, rel=1e-3)


def test_the_short_form_draws_the_same_picture_with_every_contender(
    cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_machine_figures", _no_machine)
    arguments = ["--quick", "--threads", "1", "--batches", "2", "--cache", str(tmp_path)]
    ours = "ours" if importlib.util.find_spec("openvino") else "ours, ONNX Runtime fp32"
    assert cpu.main([*arguments, "--contenders", ours, "diffusers"]) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    figures = written["figures"]["demo"]
    ours, theirs = (figures["contenders"][name] for name in (figures["reference"], "diffusers fp32"))
    assert ours["ratio"] == [1.0, 1.0, 1.0]
    assert theirs["psnr"] > 45  # measured: the same in every pixel (120); one level of 255 everywhere is 48
    assert set(ours["pictures_per_minute"]) == set(theirs["pictures_per_minute"]) == {"1", "2"}
    for one in (ours, theirs):
        assert 0 < one["first_step"][0] < one["first_picture"][0]
        assert one["text"] > 0 < one["decode"]
    assert 0 < ours["peak"] < theirs["peak"]  # there is no torch in ours


def test_what_cannot_be_made_is_a_row_with_its_reason(
    cpu: ModuleType, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, environment: str) -> str:
        if environment != "current":
            raise module("cpu_make").MakeError("environment cannot be made: no compiler")
        return sys.executable

    monkeypatch.setattr(cpu.Workshop, "python", refuse)
    monkeypatch.setattr(cpu.Workshop, "model", lambda *_: tmp_path)
    monkeypatch.setattr(cpu, "_machine_figures", _no_machine)
    monkeypatch.setattr(cpu, "_measure", lambda *_: _sample(4.0))
    figures = tmp_path / "figures.json"
    assert cpu.main(["--cache", str(tmp_path), "--json", str(figures), "--rounds", "1"]) == 0
    results = {one["name"]: one for one in json.loads(figures.read_text())["variants"]["tiny"]["contenders"]}
    assert set(results) == {row.name for row in cpu.ROWS}
    assert results["stable-diffusion.cpp f16"]["failed"] == "environment cannot be made: no compiler"
    assert results["ours, ONNX Runtime fp32"]["failed"] is None


def test_a_contender_that_fails_says_its_last_words(
    cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "PROMPT", "a\0b")
    monkeypatch.setattr(cpu, "_machine_figures", _no_machine)
    assert cpu.main(["--quick", "--threads", "1", "--cache", str(tmp_path), "--contenders", "ours, ONNX Runtime"]) == 1
    [result] = json.loads((tmp_path / "figures.json").read_text())["variants"]["demo"]["contenders"]
    assert "prompt holds a NUL character" in result["failed"]


def test_a_run_goes_on_where_it_was_cut_off(cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(_: Any, __: Any, row: Any, result: dict[str, Any], ___: Any) -> dict[str, Any] | None:
        asked.append(row.name)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return cpu._fail(result, "too little memory") if len(asked) == 2 else _sample(float(len(asked)))

    monkeypatch.setattr(cpu.Workshop, "python", lambda *_: sys.executable)
    monkeypatch.setattr(cpu.Workshop, "model", lambda *_: tmp_path)
    monkeypatch.setattr(cpu, "_machine_figures", _no_machine)
    monkeypatch.setattr(cpu, "_measure", measure)
    figures = tmp_path / "figures.json"
    run = [*("--cache", str(tmp_path), "--json", str(figures), "--rounds", "2"), "--contenders", "fp32"]
    names = [row.name for row in cpu.ROWS if "fp32" in row.name]
    with pytest.raises(KeyboardInterrupt):
        cpu.main(run)
    assert cpu.main([*run, "--resume"]) == 0
    # Of four rows the second failed in round 1; it is tried again, and the first of round 2 is not measured twice.
    assert len(names) == 4
    assert asked[5:] == [names[1], *names]
    results = json.loads(figures.read_text())["variants"]["tiny"]["contenders"]
    assert [len(result["samples"]) for result in results] == [2, 2, 2, 2]
    assert results[0]["samples"][0]["drawn"][0]["seconds"] == 1.0


def test_rows_that_a_later_run_leaves_out_keep_their_samples(
    cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def measure(_: Any, __: Any, row: Any, result: dict[str, Any], batches: tuple[int, ...]) -> dict[str, Any]:
        asked.append((row.name, batches))
        result["batches"] = [{"batch": size, "seconds": 2.0} for size in batches] or result["batches"]
        return _sample(1.0)

    monkeypatch.setattr(cpu.Workshop, "python", lambda *_: sys.executable)
    monkeypatch.setattr(cpu.Workshop, "model", lambda *_: tmp_path)
    monkeypatch.setattr(cpu, "_machine_figures", _no_machine)
    monkeypatch.setattr(cpu, "_measure", measure)
    figures = tmp_path / "figures.json"
    run = ["--cache", str(tmp_path), "--json", str(figures), "--rounds", "1", "--contenders"]
    assert cpu.main([*run, "fp32", "--batches"]) == 0
    before = json.loads(figures.read_text())["variants"]["tiny"]["contenders"]
    asked.clear()
    # Batches of a row that has its samples: measured, and no sample more. The other rows stay as they are.
    assert cpu.main([*run, "ours, ONNX Runtime", "--resume", "--batches", "2"]) == 0
    assert asked == [("ours, ONNX Runtime fp32", (2,))]
    after = json.loads(figures.read_text())["variants"]["tiny"]["contenders"]
    assert [one["name"] for one in after] == [one["name"] for one in before]
    assert [one["samples"] for one in after] == [one["samples"] for one in before]
    assert after[0]["batches"] == [{"batch": 2, "seconds": 2.0}]


def test_no_run_goes_on_with_samples_of_another_task(
    cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu.Workshop, "python", lambda *_: sys.executable)
    monkeypatch.setattr(cpu.Workshop, "model", lambda *_: tmp_path)
    monkeypatch.setattr(cpu, "_machine_figures", _no_machine)
    monkeypatch.setattr(cpu, "_measure", lambda *_: _sample(4.0))
    run = ["--cache", str(tmp_path), "--json", str(tmp_path / "figures.json"), "--rounds", "1", "--resume"]
    assert cpu.main(run) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "figures.json").write_text("[]")
    assert cpu.main(run) == 2
    assert "is no report of this benchmark" in capsys.readouterr().err
    assert cpu.main(run[:-1]) == 0
    assert cpu.main([*run, "--steps", "7"]) == 2
    assert "is of another task: steps differ; leave out --resume" in capsys.readouterr().err


def test_bf16_is_left_out_where_it_would_be_emulated(cpu: ModuleType) -> None:
    row = next(row for row in cpu.ROWS if row.name == "diffusers bf16, channels last")
    assert "emulated" in cpu._unfit(row, {"bf16": False}, [])
    assert cpu._unfit(row, {"bf16": False}, [row.name]) is None
    assert cpu._unfit(row, {"bf16": True}, []) is None


def test_ratios_are_within_rounds_and_to_the_fastest_exact_of_ours(module: Any) -> None:
    written = _written(
        tiny=[
            _contender("ours, slow", "ours", [20, 40, 20]),
            _contender("ours, fast", "ours", [10, 20, 10]),
            _contender("ours, int8", "ours", [5, 10, 5], exact=False),
            _contender("peer", "genai", [30, 20, 20]),
        ]
    )
    found = module("cpu_figures").summarise(written)["tiny"]
    assert found["reference"] == "ours, fast"
    assert found["contenders"]["peer"]["ratio"] == [2.0, 1.0, 3.0]
    assert found["contenders"]["ours, int8"]["ratio"] == [0.5, 0.5, 0.5]
    assert found["contenders"]["peer"]["text"] is None
    assert found["contenders"]["ours, int8"]["share_of_peak"] is None
    # The fastest step, 1 s, did 971 GFLOP of the 200 a second that the better of both counts allows.
    assert math.isclose(found["contenders"]["ours, fast"]["share_of_peak"], 971 / 1.0 / 200)


def test_aims_are_judged_against_the_best_peer_of_each_kind(module: Any) -> None:
    written = _written(
        tiny=[
            _contender("ours, fast", "ours", [10, 10, 10]),
            _contender("ours, cached", "ours", [4, 4, 4], exact=False, aim=2.0),
            _contender("diffusers a", "diffusers", [14, 14, 14]),
            _contender("diffusers b", "diffusers", [12, 12, 12]),
            _contender("GenAI", "genai", [9.8, 9.8, 9.8]),
            _contender("GenAI int8", "genai", [5, 5, 5], exact=False),
            _contender("GenAI, our cached", "genai", [3.8, 3.8, 3.8], exact=False, twin="ours, cached"),
        ]
    )
    aims = module("cpu_figures").summarise(written)["tiny"]["aims"]
    told = [(aim["what"], aim["peer"], round(aim["found"], 2), aim["reached"]) for aim in aims]
    assert told == [
        ("speed, exact", "diffusers b", 1.2, False),
        ("speed, exact", "GenAI", 0.98, True),
        ("time to the first picture", "diffusers a", 1.0, True),
        ("peak memory", "diffusers a", 1.0, True),
        ("speed, ours, cached", "GenAI", 2.45, True),
        ("speed, ours, cached", "GenAI, our cached", 0.95, False),
    ]


def test_psnr_tells_the_same_picture_from_another(module: Any, tmp_path: Path) -> None:
    figures = module("cpu_figures")
    for name, level in (("a", 100), ("b", 100), ("c", 101)):
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / f"{name}.png")
    a, b, c = ({"picture": str(tmp_path / f"{name}.png")} for name in "abc")
    assert figures.psnr(a, b) == figures.SAME
    assert math.isclose(figures.psnr(a, c), 20 * math.log10(255))
    assert figures.psnr(a, {"picture": "nowhere.png"}) is None


def test_the_page_has_tables_reasons_and_charts(module: Any, tmp_path: Path) -> None:
    page, figures = module("cpu_page"), module("cpu_figures")
    skipped = _contender("peer bf16", "genai", [], skipped="no bf16 | here")
    written = _written(
        tiny=[_contender("ours, fast", "ours", [10, 12, 11]), _contender("peer", "genai", [30, 31, 32]), skipped],
        **{"sd-v1.4": [_contender("ours, fast", "ours", [20, 21, 22])]},
    )
    written["figures"] = figures.summarise(written)
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter {' '.join(page.CHARTS.values())}\n")
    page.write(path, written)
    text = path.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert "\nafter images/" in text
    assert "| tiny | peer bf16 | no bf16 / here |" in text
    row = next(line for line in text.splitlines() if line.startswith("| peer |"))
    assert "2.91 (2.58 to 3.00)" in row
    assert "| ours, fast | tiny | 205 | 971 | 1.10 | 11.0 | 1.91 | 121% |" in text
    for chart in page.CHARTS.values():
        with Image.open(path.parent / chart) as drawn:
            assert drawn.width > 500
    page.write(path, written)
    assert path.read_text() == text
    plain = tmp_path / "plain" / "page.md"
    plain.parent.mkdir()
    plain.write_text(f"{page.BEGIN}\n{page.END}\n")
    page.write(plain, written)
    assert [one.name for one in plain.parent.iterdir()] == ["page.md"]  # charts where they are shown
