"""A small picture of latents without the decoder: a linear map from each latent pixel to red, green and blue.

A latent pixel stands for factor x factor pixels of the picture, and what it says of their mean colour is nearly linear.
The map is fitted once, as a model's repository is written, by least squares on what its own decoder gives: fitting at
load would make the same repository show other previews on another machine, and hold up every start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.strict_json import Fields, JsonError, parse_object

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Preview:
    """The map and how good it is.

    matrix: [C + 1, 3] float32, the last row added to every pixel, to levels from 0 to 255. rmse: root mean square of
    its error in levels, against the decoder's pictures scaled down, on `pictures` that it was not fitted to.
    """

    matrix: Array
    rmse: float
    pictures: int

    @property
    def psnr(self) -> float:
        """In dB, of 255 levels."""
        return math.inf if self.rmse == 0 else 20 * math.log10(255 / self.rmse)

    def __call__(self, latents: Array) -> NDArray[np.uint8]:
        """Latents [C, h, w] -> [h, w, 3] uint8."""
        levels = np.moveaxis(latents, 0, 2) @ self.matrix[:-1] + self.matrix[-1]  # [h, w, 3]
        return np.rint(_bounded(np.nan_to_num(levels))).astype(np.uint8)

    def to_json(self) -> str:
        rows = [[float(value) for value in row] for row in self.matrix]
        content = {"matrix": rows, "rmse": self.rmse, "psnr": min(self.psnr, 999.0), "pictures": self.pictures}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Preview:
        """Raises JsonError."""
        fields = Fields(parse_object(text), "")
        fields.only("matrix", "rmse", "psnr", "pictures")
        rows: list[list[float]] = []
        for row, where in fields.array("matrix", 1025):
            numbers = cast("list[object]", row) if isinstance(row, list) else []
            found = [float(number) for number in numbers if isinstance(number, (int, float))]
            if not len(found) == len(numbers) == 3:
                raise JsonError(f"{where} must be three numbers")
            rows.append(found)
        return cls(np.array(rows, np.float32), fields.number("rmse"), fields.integer("pictures", 1, 1 << 20))


def fit(latents: Sequence[Array], pictures: Sequence[NDArray[np.uint8]]) -> Preview:
    """Least squares on the first half of the pictures, its error on the others.

    latents: [C, h, w] each; pictures: what they decode to, [factor * h, factor * w, 3]. Two at least, else ValueError.
    """
    if len(latents) < 2:
        raise ValueError(f"fitting a preview takes two pictures or more, found {len(latents)}")
    inputs = [_columns(one) for one in latents]
    targets = [_scaled_down(picture, one.shape[1:]) for picture, one in zip(pictures, latents, strict=True)]
    half = (len(latents) + 1) // 2
    matrix, *_ = np.linalg.lstsq(np.concatenate(inputs[:half]), np.concatenate(targets[:half]), rcond=None)
    found = _bounded(np.concatenate(inputs[half:]) @ matrix)
    rmse = float(np.sqrt(np.mean((found - np.concatenate(targets[half:])) ** 2)))
    return Preview(matrix.astype(np.float32), rmse, len(latents) - half)


def _columns(latents: Array) -> NDArray[np.float64]:
    """[C, h, w] -> [h * w, C + 1], the last column ones."""
    ones = np.ones((1, *latents.shape[1:]))
    stacked: NDArray[np.float64] = np.concatenate([latents.astype(np.float64), ones])  # [C + 1, h, w]
    return np.moveaxis(np.reshape(stacked, (len(stacked), stacked.shape[1] * stacked.shape[2])), 0, 1)


def _scaled_down(picture: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.float64]:
    """[H, W, 3] -> [h * w, 3]: the mean of the pixels that a latent pixel stands for."""
    h, w = size
    blocks = np.reshape(picture, (h, picture.shape[0] // h, w, picture.shape[1] // w, 3)).astype(np.float64)
    means: NDArray[np.float64] = np.mean(blocks, axis=(1, 3))  # [h, w, 3]
    return np.reshape(means, (h * w, 3))


def _bounded(levels: NDArray[Any]) -> NDArray[Any]:
    return np.minimum(np.maximum(levels, 0), 255)
