"""Whether an engine still draws what PyTorch draws: pairs of pictures of the same captions and noise, and a verdict.

Three questions, each of which catches what the others let through:

- **Alike?** PSNR and LPIPS of each pair, against the bounds that an export keeps to.
- **Drift?** Rounding moves every picture a little, and each in its own way; a fault (a timestep off by one, a wrong
  scale) moves all the same way, often by less. So the mean relative change of brightness, contrast, sharpness and
  saturation is held to a tolerance. On the demo, 32 pictures: fp16 arithmetic 0.006 % at most, bf16 0.08 %. Timesteps
  off by one: 0.49 % of the sharpness, at 49.6 dB, where bf16 has 45.8. Latents 5 % too small: 1.05 % of the contrast.
- **Scores?** The differences of FID, Inception score and CLIP score that the pictures can tell, beside the spread that
  BK-SDM's authors see between batch sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_evaluation.inception_score import ENOUGH
from bksdm_evaluation.intervals import LEVEL, Interval, of_mean

# What an export of an approximate bundle keeps, on average over its pictures. Measured on the demo in int8, 8 pictures
# of 12 steps: 33.0 dB and 0.025 on ONNX Runtime, 33.1 dB and 0.029 on OpenVINO.
PSNR_BOUND, LPIPS_BOUND = 28.0, 0.06
# Of brightness, contrast, sharpness, saturation; see above.
DRIFT = 0.002
# Spread of the published small model between batch sizes 1, 2, 4 and 8, 30 K pictures (BK-SDM's README).
TOLERANCES: Mapping[str, float] = {"fid": 0.2, "inception score": 0.5, "clip": 0.0004}
_PEAK, _SAME = 255.0, 99.0  # levels; dB, of equal pictures
_WORST = 8
_UNJUDGED = "not judged"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """What is accepted. psnr: in dB, at least, lpips: at most, of the means; drift: relative, at most; inf for any.

    scores: differences, by name."""

    psnr: float = PSNR_BOUND
    lpips: float = LPIPS_BOUND
    drift: float = DRIFT
    scores: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))


@dataclass(frozen=True, eq=False)
class Pairs:
    """What was measured of N pairs, A first. psnr, lpips: [N]. looks: of each property, [2, N]."""

    names: Sequence[str]
    psnr: Array
    lpips: Array
    looks: Mapping[str, Array]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """In dB, of pictures [H, W, 3]; 99 where they are equal."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return min(_SAME, 10 * np.log10(_PEAK**2 / error)) if error else _SAME


def looks(pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Brightness (mean), contrast (deviation), sharpness (of the Laplacian, root mean square), and saturation (largest
    channel less smallest, mean) of [H, W, 3], in levels."""
    whole = pixels.astype(np.float64)
    grey = whole.mean(2)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    laplacian = around - 4 * grey[1:-1, 1:-1]
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "sharpness": float(np.sqrt(np.square(laplacian).mean())),
        "saturation": float((whole.max(2) - whole.min(2)).mean()),
    }


def pairs_of(
    names: Sequence[str],
    first: Sequence[NDArray[np.uint8]],
    second: Sequence[NDArray[np.uint8]],
    distances: NDArray[Any],
) -> Pairs:
    """Pictures [H, W, 3] of two sets, and their LPIPS, [N]."""
    alike = [psnr(a, b) for a, b in zip(first, second, strict=True)]
    seen = [[looks(one) for one in pictures] for pictures in (first, second)]
    properties = {what: np.array([[one[what] for one in side] for side in seen]) for what in seen[0][0]}
    return Pairs(names, np.array(alike), np.asarray(distances, np.float64), properties)


def together(parts: Sequence[Pairs]) -> Pairs:
    """One after another."""
    return Pairs(
        [name for part in parts for name in part.names],
        np.concatenate([part.psnr for part in parts]),
        np.concatenate([part.lpips for part in parts]),
        {what: np.concatenate([part.looks[what] for part in parts], axis=1) for what in parts[0].looks},
    )


def drifts(pairs: Pairs) -> dict[str, Interval]:
    """Mean relative change of each property from A to B; a picture that is nearly without it weighs as little."""
    found: dict[str, Interval] = {}
    for name, (a, b) in pairs.looks.items():
        scale = max(float(a.mean()), 1e-9)
        found[name] = of_mean((b - a) / scale)
    return found


@dataclass(frozen=True)
class Question:
    """One line of a verdict. found: in words; passed: None where the pictures cannot tell."""

    what: str
    found: str
    accepted: str
    passed: bool | None


def judge(
    pairs: Pairs, drift: Mapping[str, Interval], scores: Mapping[str, Interval], bounds: Bounds
) -> list[Question]:
    """Every question, with its answer. A score fails where all of its interval is past its tolerance."""
    p, q = float(pairs.psnr.mean()), float(pairs.lpips.mean())
    asked = [
        Question("PSNR", f"{p:.1f} dB on average", f"{bounds.psnr:g} or more", p >= bounds.psnr),
        Question("LPIPS", f"{q:.4f} on average", f"{bounds.lpips:g} or less", q <= bounds.lpips),
    ]
    for name, one in drift.items():
        found = f"{one.value:+.3%} ({one.low:+.3%} to {one.high:+.3%})"
        if np.isinf(bounds.drift):
            asked.append(Question(f"drift of {name}", found, _UNJUDGED, None))
        else:
            asked.append(Question(f"drift of {name}", found, f"{bounds.drift:.1%}", _answer(one, bounds.drift)))
    for name, one in scores.items():
        found = f"{one.value:+.4g} ({one.low:+.4g} to {one.high:+.4g})"
        if name in bounds.scores:
            tolerance = bounds.scores[name]
            # Of few pictures the Inception score is near 1 whatever they show, and so is its difference near 0.
            tells = name != "inception score" or len(pairs.names) >= ENOUGH
            answer = _answer(one, tolerance) if tells else None
            asked.append(Question(f"difference of {name}", found, f"{tolerance:g}", answer))
        else:
            asked.append(Question(f"difference of {name}", found, _UNJUDGED, None))
    return asked


def _answer(one: Interval, tolerance: float) -> bool | None:
    if one.exceeds(tolerance) or not np.isfinite([one.value, one.low, one.high]).all():
        return False
    return True if one.within(tolerance) else None


def figures(
    pairs: Pairs, drift: Mapping[str, Interval], scores: Mapping[str, Interval], bounds: Bounds
) -> dict[str, Any]:
    """All of it, for JSON."""
    asked = judge(pairs, drift, scores, bounds)
    order = np.argsort(pairs.psnr)
    return {
        "passed": not any(one.passed is False for one in asked),
        "pairs": len(pairs.names),
        "level": LEVEL,
        "questions": [asdict(one) for one in asked],
        "psnr": _spread(pairs.psnr, worst="low"),
        "lpips": _spread(pairs.lpips, worst="high"),
        "drift": {name: asdict(one) for name, one in drift.items()},
        "scores": {name: asdict(one) for name, one in scores.items()},
        "worst": [
            {"name": pairs.names[i], "psnr": float(pairs.psnr[i]), "lpips": float(pairs.lpips[i])}
            for i in order[:_WORST]
        ],
    }


def _spread(values: Array, *, worst: str) -> dict[str, float]:
    tenth = 0.1 if worst == "low" else 0.9
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "worst_tenth": float(np.quantile(values, tenth)),
        "worst": float(values.min() if worst == "low" else values.max()),
    }


def told(found: Mapping[str, Any]) -> str:
    """The verdict as a table for a terminal."""
    answers = {True: "passed", False: "FAILED", None: "not told"}
    rows = [("question", "found", "accepted", "")]
    rows += [(q["what"], q["found"], q["accepted"], answers[q["passed"]]) for q in found["questions"]]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    untold = [q["what"] for q in found["questions"] if q["passed"] is None and q["accepted"] != _UNJUDGED]
    if untold:
        lines.append(f"{found['pairs']:,} pairs are too few to tell: {', '.join(untold)}")
    return "\n".join(lines)
