"""Two minutes of what `make soak` does for fifteen."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.triton.server import ROOT


def test_two_minutes_of_mixed_load_fail_no_request_and_leak_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("serving_soak").soak(tmp_path, 120)
    print(report.told())
    assert report.faults() == []
