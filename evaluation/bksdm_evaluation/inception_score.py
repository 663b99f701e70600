"""Inception score (arXiv 1606.03498) of class logits that come batch by batch, as torch-fidelity 0.3.0 has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS, SHUFFLE_SEED = 10, 2020  # torch-fidelity's
CLASSES = 1008
ENOUGH = SPLITS * CLASSES  # pictures: a split of fewer than there are classes cannot score as high as they allow


@dataclass(frozen=True)
class Score:
    """mean and population deviation over the splits."""

    mean: float
    deviation: float
    splits: int


class Splits:
    """Takes the logits of `count` pictures in, in the order of their names, and keeps sums alone."""

    def __init__(self, count: int, splits: int = SPLITS) -> None:
        shuffled = np.random.RandomState(SHUFFLE_SEED).permutation(count)
        ends = [number * count // splits for number in range(splits + 1)]
        self._split = np.empty(count, np.intp)  # of each picture
        for number in range(splits):
            self._split[shuffled[ends[number] : ends[number + 1]]] = number
        self._taken = 0
        self._counts = np.zeros(splits)
        self._negentropy = np.zeros(splits)  # sum of sum p log p
        self._total: NDArray[np.float64] | None = None  # [splits, C], sum of p

    def add(self, logits: NDArray[Any]) -> None:
        """[B, C] of the next pictures."""
        shifted = np.asarray(logits, np.float64)
        shifted = shifted - shifted.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        if self._total is None:
            self._total = np.zeros((len(self._counts), p.shape[1]))
        which = self._split[self._taken : self._taken + len(p)]
        self._taken += len(p)
        np.add.at(self._counts, which, 1)
        np.add.at(self._negentropy, which, np.where(p > 0, p * log_p, 0).sum(1))
        np.add.at(self._total, which, p)

    def scores(self) -> NDArray[np.float64]:
        """Of each split: exp of the mean KL divergence from its own marginal. Raises ValueError while pictures are
        missing."""
        if self._total is None or self._taken != len(self._split) or not self._counts.all():
            raise ValueError(f"{self._taken} of {len(self._split)} pictures in {len(self._counts)} splits")
        q = self._total / self._counts[:, None]
        entropy = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(1)
        return np.exp(self._negentropy / self._counts - entropy)

    def result(self) -> Score:
        """Raises ValueError while pictures are missing."""
        scores = self.scores()
        return Score(float(scores.mean()), float(scores.std()), len(scores))
