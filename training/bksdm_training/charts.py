"""What a person looks at: grids of pictures and loss curves, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

mpl.use("Agg")
from matplotlib import pyplot as plt


def save_grid(pictures: Tensor, path: Path, *, columns: int, captions: Sequence[str] = (), gap: int = 4) -> None:
    """Pictures [N, 3, H, W] in [-1, 1], row by row on white, each with its caption underneath."""
    n, _, h, w = pictures.shape
    text = 14 if captions else 0
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + gap + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(n):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + gap + text)
        sheet.paste(Image.fromarray(pixels[i]), (x, y))
        if captions:
            draw.text((x, y + h), captions[i][: w // 6], fill="black")
    _save(sheet, path)


def save_curve(rows: Sequence[dict[str, float]], path: Path, *, title: str) -> None:
    """Every term of a loss log against the step, smoothed over 1 % of the run, on a log scale."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.array([row["step"] for row in rows])
    width = max(1, len(rows) // 100)
    for term in [key for key in rows[0] if key != "step"]:
        values = np.array([row[term] for row in rows])
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, label=term)
    axes.set(xlabel="step", ylabel=f"loss (mean of {width} steps)", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    staging = path.with_name(f".{path.name}")
    figure.savefig(staging, dpi=120, format="png")
    plt.close(figure)
    staging.replace(path)


def _save(sheet: Image.Image, path: Path) -> None:
    staging = path.with_name(f".{path.name}")
    sheet.save(staging, format="PNG")
    staging.replace(path)
