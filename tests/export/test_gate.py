"""--gate: pictures by PyTorch and by the bundle before it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bksdm_evaluation import gate as questions
from bksdm_export import gate
from bksdm_export.errors import ExportError
from bksdm_export.recipe import export_variant
from bksdm_export.request import ExportRequest


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "STEPS", 3)


@pytest.mark.usefixtures("few_steps")
def test_a_bundle_that_passes_carries_the_verdict(smallest_folder: Path, tmp_path: Path) -> None:
    folder = export_variant(ExportRequest(tmp_path / "bundle", weights=str(smallest_folder), gate=4))
    found = json.loads((folder / "parity.json").read_text())["gate"]
    assert found["passed"] is True
    assert found["pairs"] == 4
    assert {one["what"]: one["passed"] for one in found["questions"]}["PSNR"] is True
    assert "<h2>Gate</h2>" in (folder / "parity.html").read_text()
    assert json.loads((folder / "bundle.json").read_text())["parity"]["gate"]["pairs"] == 4


@pytest.mark.usefixtures("few_steps")
def test_one_that_does_not_is_not_kept_and_the_question_is_named(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = gate._draw

    def darker(artist, count: int):
        pictures = draw(artist, count)
        if isinstance(artist, gate.BundleArtist):
            return [(one * 0.9).astype(np.uint8) for one in pictures]
        return pictures

    monkeypatch.setattr(gate, "_draw", darker)
    why = r"does not pass the gate of 3 pictures beside PyTorch: .*drift of brightness is -"
    with pytest.raises(ExportError, match=why):
        export_variant(ExportRequest(tmp_path / "bundle", weights=str(smallest_folder), gate=3))
    assert not (tmp_path / "bundle").exists()


def test_an_approximation_may_drift_but_not_stray(tmp_path: Path) -> None:
    pairs = questions.Pairs(["a"], np.array([40.0]), np.array([0.01]), {"brightness": np.array([[100.0], [110.0]])})
    bounds = questions.Bounds(drift=float("inf"))
    asked = questions.judge(pairs, questions.drifts(pairs), {}, bounds)
    assert [one.passed for one in asked] == [True, True, None]
    assert asked[-1].accepted == "not judged"


def test_prompts_differ_for_as_long_as_they_can() -> None:
    assert len(set(gate.prompts(64))) == 64
    assert gate.prompts(66)[64:] == gate.prompts(2)
