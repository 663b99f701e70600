"""From the raw samples of the CPU benchmark to its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from statistics import median
from typing import Any

import cpu_aims

Result = Mapping[str, Any]
# Names of figures that are a contender's medians over rounds.
STAGES = ("text", "step", "decode")
SAME = 120.0  # dB: stands for infinity, which JSON has not; one channel of 512 x 512 pixels off by 1 is 107 dB


def line(sample: Result) -> str:
    """One process in one line, for the screen."""
    seconds, step = median(drawn["seconds"] for drawn in sample["drawn"]), _stage(sample, "step") or 0
    return (
        f"{seconds:8.2f} s a picture, first after {sample['first_picture']:7.2f} s, step {step:7.3f} s, "
        f"peak {sample['peak'] / 1e9:5.2f} GB"
    )


def summarise(written: Result) -> dict[str, Any]:
    """By variant: `reference`, ours that is fastest and exact, figures by name of contender, and the aims; what did not
    run is left out. Ratios: to the reference in the same round, above 1 where it is faster; [median, least, most]."""
    peaks = {name: max(peak[name] for peak in written["peaks"]) for name in written["peaks"][0]}
    figures: dict[str, Any] = {}
    for variant, part in written["variants"].items():
        ran = {result["name"]: result for result in part["contenders"] if result["samples"] and not result["failed"]}
        exact = [name for name, result in ran.items() if result["kind"] == "ours" and result["exact"]]
        reference = min(exact, key=lambda name: median(_seconds(ran[name])), default=None)
        figures[variant] = {
            "reference": reference,
            "contenders": {
                name: _figures(result, ran.get(reference) if reference else None, part["work"], peaks)
                for name, result in ran.items()
            },
        }
        figures[variant]["aims"] = cpu_aims.judge(part, figures[variant])
    return figures


def _figures(result: Result, reference: Result | None, work: Result, peaks: Mapping[str, float]) -> dict[str, Any]:
    samples = result["samples"]
    stages = {stage: _over_rounds(samples, stage) for stage in STAGES}
    best = min(step for sample in samples for drawn in sample["drawn"] for step in drawn["steps"])
    reached = {
        "step_gflops": work["guided_step"] / best / 1e9,
        # Where a step is not the whole graph in that arithmetic there is no such share.
        "share_of_peak": work["guided_step"] / best / 1e9 / peaks[result["arithmetic"]] if result["exact"] else None,
    }
    same = reference is not None
    return {
        "seconds": _spread(_seconds(result)),
        "cpu_seconds": _spread([median(drawn["cpu_seconds"] for drawn in sample["drawn"]) for sample in samples]),
        **stages,
        **reached,
        "peak": max(sample["peak"] for sample in samples),
        "first_step": _spread([sample["first_step"] for sample in samples]),
        "first_picture": _spread([sample["first_picture"] for sample in samples]),
        "ratio": _ratio(result, reference, "seconds") if same else None,
        "cpu_ratio": _ratio(result, reference, "cpu_seconds") if same else None,
        "psnr": psnr(result, reference) if same else None,
        "pictures_per_minute": {
            drawn["batch"]: 60 * drawn["batch"] / drawn["seconds"] for drawn in _of_every_batch(result)
        },
    }


def _of_every_batch(result: Result) -> list[Result]:
    fastest = min((drawn for sample in result["samples"] for drawn in sample["drawn"]), key=lambda d: d["seconds"])
    return [fastest, *(result["batches"] or [])]


def _seconds(result: Result) -> list[float]:
    """Of each round: the median of its warm pictures."""
    return [median(drawn["seconds"] for drawn in sample["drawn"]) for sample in result["samples"]]


def _over_rounds(samples: Sequence[Result], stage: str) -> float | None:
    """Median of the rounds' medians, seconds; None where the contender does not tell."""
    known = [seconds for sample in samples if (seconds := _stage(sample, stage)) is not None]
    return median(known) if known else None


def _stage(sample: Result, stage: str) -> float | None:
    every = [drawn["steps"] if stage == "step" else [drawn[stage]] for drawn in sample["drawn"]]
    known = [seconds for one in every for seconds in one if seconds is not None]
    return median(known) if known else None


def _ratio(result: Result, reference: Result, clock: str) -> list[float]:
    both = zip(result["samples"], reference["samples"], strict=False)  # a round's neighbours
    return _spread(
        [
            median(drawn[clock] for drawn in theirs["drawn"]) / median(drawn[clock] for drawn in ours["drawn"])
            for theirs, ours in both
        ]
    )


def _spread(values: Sequence[float]) -> list[float]:
    return [median(values), min(values), max(values)]


def psnr(result: Result, reference: Result) -> float | None:
    """dB between the first pictures of the two, SAME where they are; None where a picture is not there."""
    import numpy as np
    from PIL import Image

    if not all(one["picture"] and Path(one["picture"]).is_file() for one in (result, reference)):
        return None
    return decibels(*(np.asarray(Image.open(one["picture"]).convert("RGB")) for one in (result, reference)))


def decibels(one: Any, other: Any) -> float:
    """PSNR of two arrays of 8-bit pixels, SAME where they are equal."""
    error = float(((one.astype("float64") - other) ** 2).mean())
    return 10 * log10(255**2 / error) if error else SAME
