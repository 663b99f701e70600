import numpy as np
import pytest
from scipy import linalg

from bksdm_evaluation import statistics
from bksdm_evaluation.statistics import (
    Statistics,
    TooFewPictures,
    frechet_distance,
    kernel_distance,
    squared_discrepancy,
)


def _gaussian(mean, covariance, count=100):
    """The sums of a set that has exactly these moments."""
    return Statistics(count, count * mean, (count - 1) * covariance + count * np.outer(mean, mean))


def _rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def test_fid_of_gaussians_with_common_axes_is_the_closed_form():
    rng = np.random.default_rng(0)
    axes, a, b = _rotation(rng, 20), rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20)
    first, second = rng.normal(size=(2, 20))
    expected = ((first - second) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(_gaussian(first, axes * a @ axes.T), _gaussian(second, axes * b @ axes.T))
    assert found == pytest.approx(expected, rel=1e-14)  # measured 1.3e-15 over 20 draws


def test_fid_of_gaussians_whose_axes_differ_equals_the_general_matrix_root():
    rng = np.random.default_rng(1)
    first, second = ((r * rng.uniform(0.1, 3, 20)) @ r.T for r in (_rotation(rng, 20), _rotation(rng, 20)))
    expected = np.trace(first) + np.trace(second) - 2 * np.trace(linalg.sqrtm(first @ second)).real
    found = frechet_distance(_gaussian(np.zeros(20), first), _gaussian(np.zeros(20), second))
    assert found == pytest.approx(expected, rel=1e-13)  # measured 1.6e-14 over 20 draws


def test_fid_of_fewer_pictures_than_features_needs_no_offset():
    """tr (A B)^(1/2) is the sum of the singular values of X Y^T, X and Y the centred features: no covariance at all."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(12, 64)), rng.normal(0.3, 1.5, size=(9, 64))
    a, b = (rows - rows.mean(0) for rows in (x, y))
    overlap = linalg.svdvals(a @ b.T).sum() / np.sqrt(11 * 8)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() / 11 + (b**2).sum() / 8 - 2 * overlap
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(
        expected, rel=4e-15
    )  # measured 4.4e-16
    same = frechet_distance(Statistics.of(x), Statistics.of(x))
    assert abs(same) < 1e-15 * (x**2).sum()  # measured 1.3e-16


def test_shards_add_up_to_the_whole():
    rng = np.random.default_rng(3)
    features, other = rng.exponential(0.4, size=(300, 64)), Statistics.of(rng.exponential(0.5, size=(200, 64)))
    whole = Statistics.of(features)
    merged = Statistics.of(features[:7]) + Statistics.of(features[7:120]) + Statistics.of(features[120:])
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-14)  # measured 1.8e-15 over 20 draws
    np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-14)  # measured 1.3e-15
    assert frechet_distance(merged, other) == pytest.approx(frechet_distance(whole, other), rel=3e-14)  # 3.6e-15
    np.testing.assert_allclose(whole.covariance, np.cov(features.T), rtol=0, atol=5e-15)  # measured 6.4e-16


def test_too_few_pictures_are_one_sentence():
    one = Statistics.of(np.ones((1, 4)))
    with pytest.raises(TooFewPictures, match="at least 2 pictures, found 1"):
        frechet_distance(one, one)
    with pytest.raises(TooFewPictures, match="at least 1 picture, found 0"):
        _ = Statistics.of(np.empty((0, 4))).mean
    with pytest.raises(TooFewPictures, match="at least 4 pictures on each side, found 3"):
        kernel_distance(np.ones((3, 4)), np.ones((9, 4)))


def _double_loop(x, y):
    def kernel(p, q):
        return (sum(float(i) * float(j) for i, j in zip(p, q, strict=True)) / len(p) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(p, q) for p in x for q in y) / (n * m)


def test_kid_equals_a_double_loop(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = rng.exponential(0.4, size=(13, 10)), rng.exponential(0.6, size=(8, 10))
    expected = _double_loop(x, y)
    assert kernel_distance(x, y).value == pytest.approx(expected, abs=4e-14)  # measured 4.4e-15 over 20 draws
    monkeypatch.setattr(statistics, "_ROWS", 3)  # the kernel matrix in blocks
    assert squared_discrepancy(x, y) == pytest.approx(expected, abs=4e-14)  # the same


def test_kid_of_equal_distributions_is_unbiased():
    """Its mean over many small draws is zero within what their spread allows; the biased estimate's is not."""
    rng = np.random.default_rng(5)
    draws = np.array([squared_discrepancy(*rng.exponential(0.5, size=(2, 10, 16))) for _ in range(4000)])
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    assert abs(draws.mean()) < 3 * error  # measured -1.1
    assert (draws < 0).mean() > 0.3  # measured 0.54


def test_the_standard_error_is_the_spread_of_the_estimate():
    rng = np.random.default_rng(6)

    def draw():
        return rng.exponential(0.4, size=(60, 16)), rng.exponential(0.5, size=(90, 16))

    spread = np.std([squared_discrepancy(*draw()) for _ in range(500)], ddof=1)
    told = np.mean([kernel_distance(*draw()).standard_error for _ in range(40)])
    assert 0.7 < told / spread < 1.4  # measured 1.06
    few = np.mean([kernel_distance(*draw(), subset_size=20).standard_error for _ in range(40)])
    assert 0.7 < few / spread < 1.5  # subsets of 13 and 20 overstate it a little: measured 1.26


def test_subsets_are_those_that_are_usual_and_the_same_every_time():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(30, 8)), rng.normal(0.5, 1, size=(50, 8))
    found = kernel_distance(x, y, subsets=20, subset_size=25)
    assert (found.subsets, found.subset_size) == (20, 25)
    assert found == kernel_distance(x, y, subsets=20, subset_size=25)
    assert found != kernel_distance(x, y, subsets=20, subset_size=25, seed=1)
    assert found.subset_mean == pytest.approx(found.value, abs=3 * found.subset_deviation)
    whole = kernel_distance(x, y[:30])  # one subset is all there is
    assert whole.subset_size == 30
    assert whole.subset_mean == pytest.approx(whole.value, abs=1e-14)
    assert whole.standard_error > 0
