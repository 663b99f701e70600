"""What the features of a set of pictures come to: moments that merge, and a sample; in files as pytorch-fid's."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_evaluation.generation import differences
from bksdm_evaluation.statistics import Statistics

SAMPLE = 10_000  # pictures; their 2048 features are 82 MB as float32


class FeatureSetError(Exception):
    """Statistics that cannot be read, or do not go together; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """mean [D], covariance [D, D] (unbiased), float64, of `count` pictures; None where a file does not say how many.

    sample: [K, D] float32, features of the K pictures whose names have the smallest hashes, keys: these, [K] uint64,
    rising. So it is of the same pictures whatever their order, shards or machine. said: the protocol, the network and
    what else sets must share to be compared or merged.
    """

    count: int | None
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    sample: NDArray[np.float32]
    keys: NDArray[np.uint64]
    said: Mapping[str, object]

    def __add__(self, other: FeatureSet) -> FeatureSet:
        """Of both sets' pictures; to rounding what the pictures of both together give.

        Raises FeatureSetError where they share a picture, were made otherwise, or one does not say its count.
        """
        if self.said != other.said:
            raise FeatureSetError(f"statistics of {dict(self.said)} and of {dict(other.said)} do not add up")
        if self.count is None or other.count is None:
            raise FeatureSetError(
                "statistics that do not say how many pictures they are of (pytorch-fid's) do not add up"
            )
        if len(np.intersect1d(self.keys, other.keys)):
            raise FeatureSetError("the two statistics share pictures, and each is to be counted once")
        a, b = self.count, other.count
        difference = other.mean - self.mean
        # Chan, Golub, LeVeque 1979, eq. 2.1
        scatter = self.covariance * (a - 1) + other.covariance * (b - 1)
        scatter += np.outer(difference, difference) * (a * b / (a + b))
        keys = np.concatenate([self.keys, other.keys])
        kept = np.argsort(keys)[:SAMPLE]
        return FeatureSet(
            a + b,
            self.mean + difference * (b / (a + b)),
            scatter / (a + b - 1),
            np.concatenate([self.sample, other.sample])[kept],
            keys[kept],
            self.said,
        )

    def refuse_other(self, reference: FeatureSet) -> None:
        """Raises FeatureSetError where the reference was prepared otherwise: no distance to it means anything."""
        if self.said != reference.said:
            apart = differences(reference.said, self.said)
            raise FeatureSetError(
                f"the reference was prepared otherwise ({'; '.join(apart)}): take bksdm-eval statistics with the same "
                "--protocol, --size and --inception"
            )

    def save(self, path: Path) -> None:
        """As .npz, whose `mu` and `sigma` are pytorch-fid's. Whole or not at all. Raises OSError."""
        temporary = path.with_name(f".{path.name}.part")
        arrays = {"mu": self.mean, "sigma": self.covariance, "sample": self.sample, "keys": self.keys}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        try:
            with temporary.open("wb") as file:
                np.savez(file, said=np.array(json.dumps(dict(self.said), sort_keys=True)), **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class Accumulator:
    """Takes features in, batch by batch, in bounded memory."""

    def __init__(self, width: int) -> None:
        self._sums = Statistics(0, np.zeros(width), np.zeros((width, width)))
        self._sample = np.empty((0, width), np.float32)
        self._keys = np.empty(0, np.uint64)

    def add(self, names: Sequence[str], features: NDArray[Any]) -> None:
        """features: [B, D] of the pictures of these names."""
        self._sums = self._sums + Statistics.of(features)
        self._keys = np.concatenate([self._keys, np.array([_key(name) for name in names], np.uint64)])
        self._sample = np.concatenate([self._sample, np.asarray(features, np.float32)])
        if len(self._keys) > 2 * SAMPLE:
            self._cut()

    def result(self, said: Mapping[str, object]) -> FeatureSet:
        """Raises TooFewPictures on fewer than two."""
        self._cut()
        sums = self._sums
        return FeatureSet(sums.count, sums.mean, sums.covariance, self._sample, self._keys, said)

    def _cut(self) -> None:
        kept = np.argsort(self._keys)[:SAMPLE]
        self._keys, self._sample = self._keys[kept], self._sample[kept]


def load(path: Path, said: Mapping[str, object]) -> FeatureSet:
    """The statistics of a file: our own, or pytorch-fid's.

    The latter says neither of how many pictures it is nor how they were prepared: for that `said` is believed.
    Raises FeatureSetError.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu {list(mean.shape)} and sigma {list(covariance.shape)} do not go together")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("it holds NaN or infinity")
        sample = np.asarray(arrays.get("sample", np.empty((0, len(mean)))), np.float32)
        keys = np.asarray(arrays.get("keys", np.empty(0)), np.uint64)
        if sample.shape != (len(keys), len(mean)):
            raise ValueError(f"{len(keys)} keys and a sample {list(sample.shape)} do not go together")
        count = int(arrays["count"]) if "count" in arrays else None
        found = json.loads(str(arrays["said"])) if "said" in arrays else said
    except OSError as error:
        raise FeatureSetError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise FeatureSetError(f"{path} holds no statistics of pictures: {error}") from None
    return FeatureSet(count, mean, covariance, sample, keys, found)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
