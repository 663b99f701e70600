"""In which order examples are seen: shuffled, the same for any number of workers, any place in it to be looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bksdm_training.data import DataError

Key = TypeVar("Key")
Value = TypeVar("Value")

KEPT = 2  # windows and epochs: workers run a few batches ahead, so two of each are in use at a border


class ShardOrder:
    """Position 0, 1, 2, ... over endless epochs -> number of the example.

    Every epoch is a permutation of its own: the shards are permuted, and the examples of each `window` consecutive
    shards are shuffled together, so that a run of positions reads from few shards. One shard is shuffled whole.

    It follows from (seed, epoch) alone, so a run that goes on looks up its place instead of replaying the way to it.
    Positions, not shards, are dealt out to processes and workers: a batch is the same positions whoever reads it, so
    the run does not depend on how many there are. That costs nothing, as shards are read by offset, not from the start
    on: what W workers read at a time is one run of positions, and so from one window.
    """

    def __init__(self, shards: Sequence[int], seed: int, window: int) -> None:
        """shards: examples of each. seed: 0 to 2**64-1. Raises DataError without any example, ValueError otherwise."""
        if window < 1 or not 0 <= seed < 2**64 or min(shards, default=0) < 0:
            raise ValueError(f"window {window} must be 1 or more, seed {seed} in [0, 2**64), no shard negative")
        self._arguments = (tuple(shards), seed, window)
        self._counts = np.array(shards, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._seed = (seed & 0xFFFFFFFF, seed >> 32)
        self._window = window
        self.count = int(self._counts.sum())
        if not self.count:
            raise DataError("there is no example to draw from: check that the data holds pictures with captions")
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __reduce__(self):
        return (ShardOrder, self._arguments)  # what is kept is cheap to make again and need not travel to workers

    def epoch(self, position: int) -> int:
        """The epoch of a position, from 0."""
        return position // self.count

    def index(self, position: int) -> int:
        """Number of the example at a position from 0. Raises IndexError below."""
        if position < 0:
            raise IndexError(f"position {position}")
        epoch, place = divmod(position, self.count)
        _, borders = self._epoch(epoch)
        number = int(np.searchsorted(borders, place, side="right"))
        return int(self._examples(epoch, number)[place - (borders[number - 1] if number else 0)])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """An epoch's shards in order, and for each window the position within the epoch where it ends."""
        if epoch not in self._epochs:
            order = self._generator(epoch, 0).permutation(len(self._counts))
            borders = np.add.reduceat(self._counts[order], np.arange(0, len(order), self._window)).cumsum()
            _keep(self._epochs, epoch, (order, borders))
        return self._epochs[epoch]

    def _examples(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The examples of an epoch's window, shuffled."""
        if (epoch, number) not in self._windows:
            order, _ = self._epoch(epoch)
            counts, starts = self._counts.tolist(), self._starts.tolist()
            shards = order[number * self._window :][: self._window]
            pool = np.concatenate([np.arange(counts[shard]) + starts[shard] for shard in shards.tolist()])
            self._generator(epoch, number + 1).shuffle(pool)
            _keep(self._windows, (epoch, number), pool)
        return self._windows[epoch, number]

    def _generator(self, epoch: int, part: int) -> np.random.RandomState:
        # numpy's frozen generator (NEP 19): a run goes on under another version of numpy too
        return np.random.RandomState([*self._seed, epoch, part])


def _keep(cache: dict[Key, Value], key: Key, value: Value) -> None:
    while len(cache) >= KEPT:
        del cache[next(iter(cache))]  # the oldest
    cache[key] = value
