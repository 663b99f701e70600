"""How far apart two sets of features are: Frechet distance (FID) and kernel distance (KID), in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROWS = 4096  # of the kernel matrix at once: at [4096, 4096] 134 MB


class TooFewPictures(Exception):  # noqa: N818 - reads as what it says
    """A set is too small for the score asked of it; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over a set of features, float64; those of parts add up to those of the whole.

    count: number of pictures. total: [D]. outer: [D, D], the sum of f f^T."""

    count: int
    total: Array
    outer: Array

    @classmethod
    def of(cls, features: Array) -> Statistics:
        """Sums over features [N, D]."""
        rows = np.asarray(features, np.float64)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Array:
        """[D]. Raises TooFewPictures on an empty set."""
        if self.count < 1:
            raise TooFewPictures("a mean needs at least 1 picture, found 0")
        return self.total / self.count

    @property
    def covariance(self) -> Array:
        """[D, D], unbiased; of rank count - 1 at most. Raises TooFewPictures on fewer than two pictures."""
        if self.count < 2:
            raise TooFewPictures(f"a covariance needs at least 2 pictures, found {self.count}")
        return (self.outer - np.outer(self.total, self.mean)) / (self.count - 1)


class Gaussian(Protocol):
    """mean: [D]; covariance: [D, D], unbiased."""

    @property
    def mean(self) -> Array: ...

    @property
    def covariance(self) -> Array: ...


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2), the squared Frechet distance of two Gaussians.

    Dowson and Landau 1982; as FID, arXiv 1706.08500. With roots A = R R^T and B = S S^T the last trace is the sum of
    the singular values of R^T S, so that neither a product nor a general matrix root is taken, and a singular
    covariance (fewer pictures than features) needs no offset. Raises TooFewPictures."""
    difference = a.mean - b.mean
    first, second = a.covariance, b.covariance
    overlap = np.linalg.svd(_root(first).T @ _root(second), compute_uv=False).sum()
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * overlap)


def _root(covariance: Array) -> Array:
    """R [D, rank] with R R^T = covariance; what is zero but for rounding is left out."""
    values, vectors = np.linalg.eigh(covariance)
    # numpy's own threshold of matrix_rank; half of what it cuts would be negative
    kept = values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy of two sets under KID's kernel; about 0, also below, for equal distributions.

    value: the unbiased estimate from all pictures; standard_error: of it.
    subset_mean, subset_deviation: mean and population deviation over `subsets` draws of `subset_size` pictures of each
    set, the figures that are usually called KID. Their deviation depends on the size of the subsets, and is 0 where
    one subset is all there is."""

    value: float
    standard_error: float
    subset_mean: float
    subset_deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    a: Array, b: Array, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID of features [N, D] and [M, D], arXiv 1801.01401: kernel (x.y / D + 1)^3.

    The standard error is the delete-d jackknife (Shao and Wu 1989): the spread of the estimate over `subsets` random
    subsets of one share of both sets, a half or what leaves `subset_size` pictures of the larger one, times
    sqrt(share / (1 - share)). subset_size: at most; no more than the smaller set has. Raises TooFewPictures."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    smaller, larger = sorted((len(a), len(b)))
    if smaller < 4:  # the halves need two each
        raise TooFewPictures(f"a kernel distance needs at least 4 pictures on each side, found {smaller}")
    rng = np.random.default_rng(seed)

    def spread(sizes: tuple[int, int]) -> Array:
        return np.array(
            [
                squared_discrepancy(
                    *(rows[rng.permutation(len(rows))[:n]] for rows, n in zip((a, b), sizes, strict=True))
                )
                for _ in range(subsets)
            ]
        )

    size = min(subset_size, smaller)
    usual = spread((size, size))
    share = min(0.5, subset_size / larger)
    parts = spread((max(2, round(share * len(a))), max(2, round(share * len(b)))))
    return KernelDistance(
        value=squared_discrepancy(a, b),
        standard_error=float(parts.std(ddof=1) * np.sqrt(share / (1 - share))),
        subset_mean=float(usual.mean()),
        subset_deviation=float(usual.std()),
        subsets=subsets,
        subset_size=size,
    )


def squared_discrepancy(a: Array, b: Array) -> float:
    """Unbiased estimate of the squared discrepancy of [N, D] and [M, D], N and M at least 2, in bounded memory."""
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - kernel(np.einsum("nd,nd->n", a, a), a.shape[1]).sum()) / (n * (n - 1))
    within_b = (_kernel_sum(b, b) - kernel(np.einsum("nd,nd->n", b, b), b.shape[1]).sum()) / (m * (m - 1))
    return float(within_a + within_b - 2 * _kernel_sum(a, b) / (n * m))


def _kernel_sum(a: Array, b: Array) -> float:
    return sum(
        float(kernel(a[i : i + _ROWS] @ b[j : j + _ROWS].T, a.shape[1]).sum())
        for i in range(0, len(a), _ROWS)
        for j in range(0, len(b), _ROWS)
    )


def kernel(products: Array, width: int) -> Array:
    """KID's, of inner products of features of that width."""
    k = products / width + 1
    return k * k * k  # numpy's ** 3 is a call of pow per element
