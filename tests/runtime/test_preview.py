"""A linear preview: what it fits, what it shows, and its file."""

from __future__ import annotations

import numpy as np
import pytest

from bksdm_runtime.preview import Preview, fit
from bksdm_runtime.strict_json import JsonError


def latents(count: int, channels: int = 4) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((channels, 6, 5)).astype(np.float32) for _ in range(count)]


def linear_pictures(inputs: list[np.ndarray], matrix: np.ndarray) -> list[np.ndarray]:
    levels = [np.moveaxis(one, 0, 2).astype(np.float64) @ matrix[:-1] + matrix[-1] for one in inputs]
    return [np.kron(np.rint(one), np.ones((8, 8, 1))).astype(np.uint8) for one in levels]


MATRIX = np.array([[20, 0, 3], [0, 10, -4], [1, 2, 3], [-9, 5, 0], [128, 120, 110]], np.float64)


def test_a_linear_decoder_is_fitted_to_its_rounding() -> None:
    inputs = latents(4)
    pictures = linear_pictures(inputs, MATRIX)
    found = fit(inputs, pictures)
    np.testing.assert_allclose(found.matrix, MATRIX, atol=0.2)  # levels are rounded: 0.07 measured
    assert found.pictures == 2
    assert found.rmse < 0.35  # 0.29, that of rounding: 1 / sqrt(12)
    assert found.psnr > 57
    small = found(inputs[3])
    assert (small.shape, small.dtype) == ((6, 5, 3), np.uint8)
    assert np.abs(small.astype(int) - pictures[3][::8, ::8]).max() <= 1


def test_its_error_is_that_of_pictures_it_has_not_seen() -> None:
    inputs = latents(2)
    seen, unseen = linear_pictures(inputs, MATRIX)
    assert fit(inputs, [seen, unseen + 20]).rmse == pytest.approx(20, abs=0.5)


def test_levels_stay_within_a_byte() -> None:
    bright = Preview(np.full((5, 3), 1000, np.float32), 0, 1)
    assert (bright(np.ones((4, 2, 2), np.float32)) == 255).all()
    assert (bright(np.full((4, 2, 2), np.nan, np.float32)) == 0).all()


def test_its_file_gives_it_back() -> None:
    inputs = latents(3)
    before = fit(inputs, linear_pictures(inputs, MATRIX))
    after = Preview.from_json(before.to_json())
    np.testing.assert_array_equal(after.matrix, before.matrix)
    assert (after.rmse, after.pictures) == (before.rmse, before.pictures)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "must hold a JSON object"),
        ('{"matrix": [[1, 2]], "rmse": 1, "psnr": 1, "pictures": 1}', r"matrix\[0\] must be three numbers"),
        ('{"matrix": [[1, 2, "3"]], "rmse": 1, "psnr": 1, "pictures": 1}', r"matrix\[0\] must be three numbers"),
        ('{"matrix": [], "rmse": NaN, "psnr": 1, "pictures": 1}', "NaN"),
        ('{"matrix": [], "rmse": 1, "psnr": 1, "pictures": 1, "more": 1}', "more is unknown"),
    ],
)
def test_a_damaged_file_is_refused(text: str, says: str) -> None:
    with pytest.raises(JsonError, match=says):
        Preview.from_json(text)


def test_one_picture_is_not_enough() -> None:
    with pytest.raises(ValueError, match="two pictures or more, found 1"):
        fit(latents(1), linear_pictures(latents(1), MATRIX))
