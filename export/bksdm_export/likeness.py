"""How like PyTorch's exact pictures those of an approximate bundle are, on each backend: PSNR for the pixels, LPIPS
for the eye.

Element by element int8 is far from fp32, and a downsampled attention from a whole one, and it means little: a later
step of the sampler corrects what an earlier missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bksdm.packages import PackageError
from bksdm.perceptual import Lpips
from bksdm_evaluation.gate import LPIPS_BOUND, PSNR_BOUND
from bksdm_evaluation.gate import psnr as psnr_of
from bksdm_export.errors import ExportError

_LPIPS_SIDE = 32  # Lpips takes no smaller ones


@dataclass(frozen=True)
class Likeness:
    """One backend's pictures against PyTorch's. psnr: in dB, of each picture; lpips: of each, 0 is the same."""

    backend: str
    psnr: tuple[float, ...]
    lpips: tuple[float, ...]

    def failures(self) -> list[str]:
        """What is past its bound, one sentence each."""
        psnr, lpips = float(np.mean(self.psnr)), float(np.mean(self.lpips))
        on = f"pictures on {self.backend} are too far from PyTorch's exact ones:"
        found: list[str] = []
        if not psnr >= PSNR_BOUND:
            found.append(f"{on} {psnr:.1f} dB PSNR on average (accepted {PSNR_BOUND:g} or more)")
        if not lpips <= LPIPS_BOUND:
            found.append(f"{on} {lpips:.3f} LPIPS on average (accepted {LPIPS_BOUND:g} or less)")
        return found


def judge(backend: str, pairs: Sequence[tuple[NDArray[np.uint8] | None, NDArray[np.uint8]]]) -> Likeness:
    """What a backend drew beside PyTorch's, [H, W, 3]; what it could not draw is infinitely far. Raises ExportError.

    LPIPS' weights come from a package, see bksdm.packages.
    """
    try:
        distance = Lpips()
    except PackageError as error:
        raise ExportError(f"its pictures are judged by LPIPS, whose weights are missing: {error}") from error
    psnr: list[float] = []
    lpips: list[float] = []
    for found, expected in pairs:
        if found is None:
            psnr.append(-math.inf)
            lpips.append(math.inf)
            continue
        psnr.append(psnr_of(found, expected))
        lpips.append(float(distance(_tensor(found), _tensor(expected))))
    return Likeness(backend, tuple(psnr), tuple(lpips))


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]; a picture too small for LPIPS with every pixel repeated."""
    times = math.ceil(_LPIPS_SIDE / min(pixels.shape[:2]))
    large = pixels.repeat(times, axis=0).repeat(times, axis=1)
    return torch.from_numpy(large.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
