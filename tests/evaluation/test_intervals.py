"""Intervals against brute force and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from bksdm_evaluation import intervals
from bksdm_evaluation.intervals import LEVEL, Interval
from bksdm_evaluation.statistics import Statistics, frechet_distance, squared_discrepancy

RANDOM = np.random.default_rng(0)


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        one = intervals.of_mean(np.random.default_rng(seed).normal(3, 2, 60))
        held += one.low <= 3 <= one.high
    assert 0.955 <= held / 200 <= 1  # LEVEL is 0.99; measured 0.99
    assert LEVEL == 0.99


def test_the_interval_over_splits_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(0.3, 0.2, 10)
    found = intervals.of_splits(values)
    low, high = stats.t.interval(LEVEL, 9, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)  # of a quantile of five digits
    assert found.value == pytest.approx(values.mean())
    with pytest.raises(ValueError, match="of 10 splits, found 9"):
        intervals.of_splits(values[:9])


def test_a_difference_of_kid_is_that_of_two_kids_and_its_jackknife_is_brute_force() -> None:
    a, reference = RANDOM.normal(size=(20, 6)), RANDOM.normal(0.3, 1, (30, 6))
    b = a + RANDOM.normal(0, 0.2, a.shape)
    found = intervals.of_kernel_distances(a, b, reference)
    expected = squared_discrepancy(a, reference) - squared_discrepancy(b, reference)
    assert found.value == pytest.approx(expected, rel=1e-9)
    left = np.array(
        [
            squared_discrepancy(np.delete(a, i, 0), reference) - squared_discrepancy(np.delete(b, i, 0), reference)
            for i in range(20)
        ]
    )
    error = np.sqrt(19 / 20 * ((left - left.mean()) ** 2).sum())
    assert found.high - found.value == pytest.approx(2.5758 * error, rel=1e-8)


def test_pairs_make_a_difference_far_more_certain_than_two_sets_would() -> None:
    a, reference = RANDOM.normal(size=(200, 6)), RANDOM.normal(0.3, 1, (300, 6))
    alike = intervals.of_kernel_distances(a, a + RANDOM.normal(0, 0.01, a.shape), reference)
    others = intervals.of_kernel_distances(a, RANDOM.normal(size=a.shape), reference)
    assert (alike.high - alike.low) * 20 < others.high - others.low


def test_a_difference_of_fid_is_that_of_two_fids() -> None:
    a, reference = RANDOM.normal(size=(80, 5)), Statistics.of(RANDOM.normal(0.3, 1, (300, 5)))
    b = a + 0.5
    found = intervals.of_frechet_distances(b, a, reference)
    expected = frechet_distance(Statistics.of(b), reference) - frechet_distance(Statistics.of(a), reference)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.low < expected < found.high
    same = intervals.of_frechet_distances(a, a, reference)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_what_an_interval_says_of_a_tolerance() -> None:
    inside, outside, across = (Interval(0.0, low, high, "") for low, high in ((-1, 1), (3, 4), (1, 3)))
    assert inside.within(2)
    assert outside.exceeds(2)
    assert not across.within(2)
    assert not across.exceeds(2)
    assert Interval(-3.0, -4, -3, "").exceeds(2)
