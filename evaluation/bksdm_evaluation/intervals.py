"""Intervals of means and of differences of scores over the same pictures: the bootstrap and the jackknife."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_evaluation.inception_score import SPLITS
from bksdm_evaluation.statistics import Statistics, frechet_distance, kernel

RESAMPLES, SEED = 2000, 0
LEVEL = 0.99  # of every interval: a gate asks many questions at once
_NORMAL = 2.5758  # standard errors to either side of it
_STUDENT = 3.2498  # the same of ten values, by Student's t with 9 degrees of freedom
_ROWS = 200  # resamples at once
GROUPS = 20  # of the jackknife where a score is dear

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Where a value lies, at LEVEL. method: how that was found."""

    value: float
    low: float
    high: float
    method: str

    def exceeds(self, tolerance: float) -> bool:
        """All of it is further from 0 than the tolerance."""
        return self.low > tolerance or self.high < -tolerance

    def within(self, tolerance: float) -> bool:
        """None of it is further from 0 than the tolerance."""
        return -tolerance <= self.low and self.high <= tolerance


def of_mean(values: NDArray[Any]) -> Interval:
    """Of the mean of one value a picture, [N], by the percentile bootstrap over pictures (Efron 1979)."""
    values = np.asarray(values, np.float64)
    random = np.random.default_rng(SEED)
    means = np.concatenate(
        [values[random.integers(0, len(values), (_ROWS, len(values)))].mean(1) for _ in range(RESAMPLES // _ROWS)]
    )
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return Interval(float(values.mean()), low, high, f"bootstrap, {RESAMPLES}")


def of_splits(values: NDArray[Any]) -> Interval:
    """Of the mean of one value a split, [10], each of its own pictures: Student 1908."""
    if len(values) != SPLITS:
        raise ValueError(f"of {SPLITS} splits, found {len(values)}")
    value, error = float(values.mean()), float(values.std(ddof=1) / SPLITS**0.5)
    return Interval(value, value - _STUDENT * error, value + _STUDENT * error, f"Student's t, {SPLITS} splits")


def of_kernel_distances(a: Array, b: Array, reference: Array) -> Interval:
    """Of KID(a, reference) - KID(b, reference); row i of a and of b, [N, D], are of the same caption.

    By the jackknife over captions, which the unbiased estimate has in closed form. Four rows or more.
    """
    n, width = a.shape

    def leaving_one_out(rows: Array) -> tuple[float, Array]:
        own = kernel(rows @ rows.T, width)
        np.fill_diagonal(own, 0)
        sums = own.sum(1)  # [N], of each row to all others
        cross = kernel(rows @ reference.T, width).mean(1)  # [N]
        whole = sums.sum() / (n * (n - 1)) - 2 * cross.mean()
        without = (sums.sum() - 2 * sums) / ((n - 1) * (n - 2)) - 2 * (cross.sum() - cross) / (n - 1)
        return float(whole), without

    (first, first_without), (second, second_without) = leaving_one_out(a), leaving_one_out(b)
    return _jackknife(first - second, first_without - second_without, f"jackknife, {n}")


def of_frechet_distances(a: Array, b: Array, reference: Any) -> Interval:
    """Of FID(a, reference) - FID(b, reference), as above, by the jackknife over GROUPS groups of captions."""
    groups = np.arange(len(a)) % GROUPS

    def distance(rows: Array) -> float:
        return frechet_distance(Statistics.of(rows), reference)

    def without(rows: Array) -> Array:
        return np.array([distance(rows[groups != group]) for group in range(GROUPS)])

    return _jackknife(distance(a) - distance(b), without(a) - without(b), f"jackknife, {GROUPS} groups")


def _jackknife(value: float, without: Array, method: str) -> Interval:
    """Tukey 1958: the spread of the values that leave one part out, times the number of the others."""
    count = len(without)
    error = float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))
    return Interval(value, value - _NORMAL * error, value + _NORMAL * error, method)
