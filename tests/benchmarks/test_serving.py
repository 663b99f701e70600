"""benchmarks/serving.py: what its page says of measured turns, and what its soak calls a fault."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("serving_page")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("serving_soak")


def measured(ours: float, plain: float) -> dict[str, Any]:
    turns = [
        {"server": server, "clients": 8, "round": turn, "per_second": rate * (1 + turn), "latencies": [1.0, 2.0, 3.0]}
        for turn in range(3)
        for server, rate in (("ours", ours), ("plain", plain))
    ]
    facts = {"triton": "2.51, CPU", "machine": "x", "threads": 2, "onnxruntime": "1", "model": "demo", "steps": 25}
    return {**facts, "seconds": 10.0, "turns": turns}


def test_the_aim_is_of_the_ratio_within_a_round(page: ModuleType) -> None:
    assert page.ratios(measured(1.4, 1.0), 8) == pytest.approx([1.4] * 3)
    assert page.is_met(measured(1.4, 1.0))
    assert not page.is_met(measured(1.2, 1.0))


def test_the_table_lands_between_its_markers_and_again(page: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "serving.md"
    target.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.write(target, measured(1.5, 1.0))
    text = target.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| 8 | 3.00 | 2.00 | 3.00 | 3.00 | 2.00 | 2.00 | 3.00 | 3.00 | 1.50 (1.50-1.50) |") == 1


def test_the_page_has_the_markers(page: ModuleType) -> None:
    text = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    assert text.count(page.BEGIN) == text.count("<!-- made by benchmarks/serving.py") == 1


def test_growth_a_leak_and_a_failed_request_are_faults(soak: ModuleType) -> None:
    calm = [(float(second), 400 << 20, 40 << 20) for second in range(100)]
    growing = [(second, own + (int(second) << 20), shared) for second, own, shared in calm]
    done = dict.fromkeys(soak.KINDS, 3)

    def report(**changes: Any) -> Any:
        found = soak.Report(100.0, memory=calm)
        found.done.update(done)
        for name, value in changes.items():
            setattr(found, name, value)
        return found

    assert report().faults() == []
    assert "memory grew from" in report(memory=growing).faults()[0]
    assert "left behind: x" in report(left_behind=["x"]).faults()[0]
    assert report(failed=["drawn: GoneError"]).faults() == ["drawn: GoneError"]
    assert "not every kind" in report(done=soak.Counter()).faults()[0]
