"""Two models' pictures of the same captions and noise, one above the other, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

_GAP, _TEXT, _LETTER = 4, 14, 6  # pixels; Pillow's own font is about 6 px wide


@dataclass(frozen=True)
class Band:
    """above, below: pictures of the captions, all of one size; at least one."""

    captions: Sequence[str]
    above: Sequence[Image.Image]
    below: Sequence[Image.Image]


def save_grid(bands: Sequence[Band], path: Path) -> None:
    """One column per caption on white, its caption underneath; bands below each other. The whole file or none."""
    width, height = bands[0].above[0].size
    columns = max(len(band.captions) for band in bands)
    band_height = 2 * (height + _GAP) + _TEXT
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(bands) * band_height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, band in enumerate(bands):
        top = _GAP + row * band_height
        for column, caption in enumerate(band.captions):
            left = _GAP + column * (width + _GAP)
            sheet.paste(band.above[column], (left, top))
            sheet.paste(band.below[column], (left, top + height + _GAP))
            draw.text((left, top + 2 * height + _GAP), caption[: width // _LETTER], fill="black")
    staging = path.with_name(f".{path.name}")
    sheet.save(staging, format="PNG")
    staging.replace(path)
