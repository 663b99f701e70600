"""What is exported runs alike on every backend of a CPU, however it is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bksdm_export.reference import Reference
from bksdm_export.verify import ORT, TOLERANCES, compare, verify_component
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings, open_engine

F32 = EngineSettings(backend="openvino", threads=1, arithmetic="f32")


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_openvino_in_f32_passes_the_parity_that_onnxruntime_passes(
    exported: Callable[..., Path], smallest_reference: Reference, storage: str
) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'bksdm[openvino]'")
    bundle = bundles.load(exported("fp32", storage))
    for component, cases in smallest_reference.cases.items():
        ours, reference = open_engine(bundle, component, F32), open_engine(bundle, component, ORT)
        for case in cases:
            [(name, expected)] = reference(case.inputs).items()
            compared = compare(case.label, ours(case.inputs)[name], expected)
            # measured: 2.4e-6 at most; accepted is what the graph may differ from PyTorch by
            assert compared.error <= TOLERANCES["fp32", storage].components[component], compared


def test_export_verifies_on_onnxruntime_whatever_is_installed(
    exported: Callable[..., Path], smallest_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[EngineSettings] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # openvino is there
    monkeypatch.setattr(
        "bksdm_export.verify.open_engine", lambda *arguments: opened.append(arguments[2]) or open_engine(*arguments)
    )
    [compared, *_] = verify_component(bundles.load(exported("fp32")), "unet", smallest_reference.cases["unet"][:1])
    assert [settings.backend for settings in opened] == ["onnxruntime"]
    assert np.isfinite(compared.error)
