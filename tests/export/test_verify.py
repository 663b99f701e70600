"""What counts as equal to PyTorch, and what never does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bksdm import vocabulary
from bksdm_export.errors import ExportError
from bksdm_export.graphs import COMPONENTS
from bksdm_export.reference import Case, Picture, PictureRequest
from bksdm_export.verify import (
    TOLERANCES,
    Comparison,
    Parity,
    Rounding,
    Tolerance,
    compare,
    compare_picture,
    verify_component,
    verify_tokenizer,
)
from bksdm_runtime import bundle as bundles

REQUEST = PictureRequest("a red apple", 0, 8, 8, 4, 7.5)
TOLERANCE = Tolerance({"unet": 1e-5}, picture=0.1)


def picture(value: float = 0.5) -> Picture:
    return Picture(REQUEST, np.full((8, 8, 3), value, np.float32))


def test_error_is_the_largest_difference_over_the_largest_value() -> None:
    expected = np.array([1.0, -4.0, 2.0], np.float32)
    found = np.array([1.0, -4.0, 2.5], np.float32)
    assert compare("x", found, expected).error == 0.125
    assert compare("x", expected, expected).error == 0.0


def test_zeros_are_compared_absolutely() -> None:
    zeros = np.zeros(3, np.float32)
    assert compare("x", zeros, zeros).error == 0.0
    assert compare("x", zeros + np.float32(0.5), zeros).error == 0.5


@pytest.mark.parametrize(
    ("found", "note"),
    [
        (np.zeros((1, 3), np.float32), r"float32\[1, 3\] where PyTorch gives float32\[3\]"),
        (np.zeros(3, np.float16), r"float16\[3\]"),
        (np.array([0, np.nan, np.inf], np.float32), "2 of 3 values are NaN or infinite"),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(found: np.ndarray, note: str) -> None:
    compared = compare("x", found, np.zeros(3, np.float32))
    assert compared.error == math.inf
    import re

    assert re.search(note, compared.note)


def test_a_failure_names_component_case_and_both_figures() -> None:
    parity = Parity(TOLERANCE, {"unet": (Comparison("64x64", 1e-6), Comparison("40x56", 2e-5))}, ())
    assert parity.failures() == ["unet differs by 2.0e-05 (accepted 1e-05) at 40x56"]


@pytest.mark.parametrize("errors", [[math.nan], [1e-6, math.nan], [math.nan, 1e-6]])
def test_nan_is_never_within_a_tolerance(errors: list[float]) -> None:
    """Python's max kept 1e-6 of [1e-6, nan]."""
    comparisons = tuple(Comparison("64x64", error) for error in errors)
    parity = Parity(TOLERANCE, {"unet": comparisons}, ())
    assert math.isnan(parity.worst("unet").error)
    assert parity.failures()


def test_a_reference_that_is_not_finite_is_nothing_to_be_equal_to() -> None:
    broken = np.array([1, np.nan, np.inf], np.float32)
    compared = compare("x", np.ones(3, np.float32), broken)
    assert (compared.error, compared.note) == (math.inf, "PyTorch's own: 2 of 3 values are NaN or infinite")
    parity = Parity(TOLERANCE, {"unet": (compared,)}, ())
    assert parity.failures() == ["unet cannot be compared at x: PyTorch's own: 2 of 3 values are NaN or infinite"]
    black = compare_picture(picture(math.nan), np.zeros((8, 8, 3), np.uint8))
    assert Parity(TOLERANCE, {}, (black,)).failures()


def test_rounding_that_changes_the_picture_fails() -> None:
    assert Parity(TOLERANCE, {}, (), rounding=Rounding("fp16", 0.03)).failures() == []
    assert Parity(TOLERANCE, {}, (), rounding=Rounding("int8", 3.5)).failures() == [
        "weights rounded to int8 change PyTorch's own picture by 3.50/255 on average (accepted 3/255): "
        "store them as fp16"
    ]
    assert Parity(TOLERANCE, {}, (), rounding=Rounding("fp16", math.nan)).failures()


def test_the_runtimes_tokenizer_is_the_checkpoints(tmp_path: Path) -> None:
    tokenizer = vocabulary.clip()
    vocabulary.save(tokenizer, tmp_path)
    verify_tokenizer(tokenizer, tmp_path)
    vocabulary.save(vocabulary.clip("!"), tmp_path)
    with pytest.raises(ExportError, match=r"tokenizer is not the checkpoint's: token 2 of '' is 0, .* is 49407"):
        verify_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ExportError, match="the runtime cannot read the checkpoint's tokenizer"):
        verify_tokenizer(tokenizer, tmp_path)


def test_a_token_that_is_lost_is_noticed(tmp_path: Path) -> None:
    tokenizer = vocabulary.clip()
    vocabulary.save(tokenizer, tmp_path)
    tokenizer.add_tokens(["<cat-toy>"])
    with pytest.raises(
        ExportError, match=r"token 4 of 'a photo of <cat-toy>, framed' is \d+, the checkpoint's is 49408"
    ):
        verify_tokenizer(tokenizer, tmp_path)


def test_a_picture_over_its_mean_difference_fails() -> None:
    close = compare_picture(picture(), np.full((8, 8, 3), 128, np.uint8))
    far = compare_picture(picture(), np.full((8, 8, 3), 131, np.uint8))
    assert (close.mean, far.mean, far.largest) == (0.0, 3.0, 3.0)
    assert Parity(TOLERANCE, {}, (close,)).failures() == []
    assert Parity(TOLERANCE, {}, (close, far)).failures() == [
        "the picture of 'a red apple' differs by 3.00/255 on average (accepted 0.1/255)"
    ]


def test_a_picture_that_was_not_drawn_fails() -> None:
    lost = compare_picture(picture(), None, "unet gave NaN")
    assert lost.mean == math.inf
    assert Parity(TOLERANCE, {}, (lost,)).failures()[0].endswith(": unet gave NaN")
    small = compare_picture(picture(), np.zeros((4, 8, 3), np.uint8))
    assert small.note == "[4, 8, 3] where PyTorch gives [8, 8, 3]"


def test_a_graph_that_raises_fails(exported: Callable[..., Path]) -> None:
    bundle = bundles.load(exported("fp32"))
    inputs = {"latent_sample": np.zeros((1, 3, 8, 8), np.float32)}  # one channel short
    [compared] = verify_component(bundle, "vae_decoder", [Case("8x8", inputs, {"sample": np.zeros(1)})])
    assert compared.error == math.inf
    assert "latent_sample must be" in compared.note


def test_every_precision_has_a_tolerance_for_every_component() -> None:
    assert set(TOLERANCES) == {
        ("fp32", "fp32"),
        ("fp32", "fp16"),
        ("fp32", "int8"),
        ("fp16", "fp16"),
        ("int8", "int8"),
    }
    for tolerance in TOLERANCES.values():
        assert {"text_encoder", "vae_encoder"} <= set(tolerance.components) <= {*COMPONENTS, "unet_shallow"}
