"""Decoding in overlapping tiles: memory for one tile, whatever the size of the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# Latents that neighbouring tiles share at least, blended linearly over; a tile must be wider than twice that. More
# gains nothing, since the difference is that norms see a tile: 4, 8 and 16 give a 768 px mosaic of nine pictures,
# through the demo's decoder in tiles of 416 px, at 39.0, 39.0 and 39.2 dB of decoding it at once.
OVERLAP = 8


def decode_tiles(decode: Callable[[Array], Array], latents: Array, tile: tuple[int, int], factor: int) -> Array:
    """Decode latents [1, C, h, w] to [1, 3, factor * h, factor * w] in tiles of one shape, so that one is compiled.

    decode: what decodes one tile. tile: its height and width in latents; where the latents are no larger, they are
    decoded at once. Not exact: a decoder's norms and its attention see a tile, not the picture.
    """
    h, w = latents.shape[2:]
    height, width = min(tile[0], h), min(tile[1], w)
    if (height, width) == (h, w):
        return decode(latents)
    weight = np.outer(_ramp(height * factor, factor), _ramp(width * factor, factor))  # [H, W] of a tile
    picture = np.zeros((1, 3, factor * h, factor * w), np.float32)
    total = np.zeros((factor * h, factor * w), np.float32)
    for top in _starts(h, height):
        for left in _starts(w, width):
            part = decode(np.ascontiguousarray(latents[:, :, top : top + height, left : left + width]))
            rows = slice(factor * top, factor * (top + height))
            columns = slice(factor * left, factor * (left + width))
            picture[:, :, rows, columns] += part * weight
            total[rows, columns] += weight
    return picture / total


def _starts(whole: int, tile: int) -> list[int]:
    """Where tiles begin, evenly spread, the last one ending with the whole; neighbours share OVERLAP or more."""
    count = 1 if whole <= tile else -(-(whole - OVERLAP) // (tile - OVERLAP))
    return [round(place) for place in np.linspace(0, whole - tile, count).tolist()]


def _ramp(length: int, factor: int) -> Array:
    """Weights of a tile's pixels along one side: rising from its edges to 1 over the overlap."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5  # to the nearer edge
    return np.minimum(distance / (OVERLAP * factor), 1).astype(np.float32)
