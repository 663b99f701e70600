"""Scores of a set of picture files, all in one pass over them, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from bksdm.packages import PACKAGES
from bksdm_evaluation import devices, inception, inception_weights
from bksdm_evaluation.clip_score import Clip
from bksdm_evaluation.feature_set import Accumulator, FeatureSet
from bksdm_evaluation.inception_score import SPLITS, Score, Splits
from bksdm_evaluation.picture_files import PicturesError, Reader
from bksdm_evaluation.protocol import Protocol as Preparation

BATCH = 16
T = TypeVar("T")
Logits = Callable[[NDArray[np.uint8]], NDArray[np.float64]]  # [B, 3, H, W] -> [B, C]


class Meter(Protocol):
    """One network's part of the pass: prepares a picture in a thread, and takes prepared ones in batches."""

    def prepare(self, picture: Image.Image) -> Any: ...

    def take(self, names: Sequence[str], prepared: Sequence[Any]) -> None: ...


class FeatureMeter:
    """Inception features as FID and KID take them; the protocol says how their input is resized."""

    def __init__(self, network: nn.Module, protocol: Preparation) -> None:
        self._network, self._protocol = network, protocol
        self._features = Accumulator(inception.WIDTH)

    def prepare(self, picture: Image.Image) -> NDArray[Any]:
        if self._protocol.is_published:
            return np.moveaxis(np.asarray(picture), 2, 0)  # [3, H, W] uint8
        return inception.prepare_clean(picture)

    @torch.no_grad()
    def take(self, names: Sequence[str], prepared: Sequence[NDArray[Any]]) -> None:
        batch = torch.from_numpy(np.stack(prepared))
        if self._protocol.is_published:
            batch = inception.prepare(batch)
        features = self._network(batch.to(devices.of(self._network)))
        self._features.add(names, features.double().cpu().numpy())

    def result(self, size: int) -> FeatureSet:
        """Raises TooFewPictures on fewer than two."""
        return self._features.result(said_of_features(self._protocol, size, self._network))


def said_of_features(protocol: Preparation, size: int, network: nn.Module) -> dict[str, object]:
    """What statistics must share to be compared."""
    of_a_file = isinstance(network, inception_weights.InceptionV3)
    sha256 = network.sha256 if of_a_file else PACKAGES[inception.PACKAGE].sha256
    return {"protocol": protocol.name, "size": size, "network": sha256}


class InceptionScoreMeter:
    """logits: [B, 3, H, W] uint8 -> [B, C]; count: of all pictures. Raises PicturesError on fewer than ten."""

    def __init__(self, logits: Logits, count: int) -> None:
        if count < SPLITS:
            raise PicturesError(f"the Inception score is a mean over {SPLITS} splits, found {count} pictures")
        self._logits, self._splits = logits, Splits(count)

    def prepare(self, picture: Image.Image) -> NDArray[np.uint8]:
        return np.moveaxis(np.asarray(picture), 2, 0)

    def take(self, names: Sequence[str], prepared: Sequence[NDArray[np.uint8]]) -> None:
        self._splits.add(self._logits(np.stack(prepared)))

    def result(self) -> Score:
        return self._splits.result()

    def scores(self) -> NDArray[np.float64]:
        """Of each split."""
        return self._splits.scores()


@dataclass
class ClipMeter:
    """cosines: of each picture so far, by name."""

    clip: Clip
    captions: Mapping[str, str]
    cosines: dict[str, float] = field(default_factory=dict)

    def prepare(self, picture: Image.Image) -> NDArray[np.float32]:
        return self.clip.prepare(picture)

    def take(self, names: Sequence[str], prepared: Sequence[NDArray[np.float32]]) -> None:
        found = self.clip.cosines(prepared, [self.captions[name] for name in names])
        self.cosines.update(zip(names, found.tolist(), strict=True))


@dataclass(frozen=True)
class Source(Generic[T]):
    """Picture files and how they come to their networks. real: of any size, which the protocol brings to `size`."""

    files: Mapping[str, Path]
    protocol: Preparation
    size: int
    real: bool = False


def run(
    source: Source[Any],
    meters: Sequence[Meter],
    *,
    threads: int | None = None,
    batch_size: int = BATCH,
    on_progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Every picture through every meter, in the order of the names.

    threads: that read ahead, one for each usable core by default. Raises PicturesError, after all were read, where some
    could not be, or are generated and not `size` pixels square: counted and named.
    """

    def prepare(_name: str, picture: Image.Image) -> list[Any]:
        if source.real:
            picture = source.protocol.real(picture, source.size)
        else:
            picture = of_size(picture, source.size)
        return [meter.prepare(picture) for meter in meters]

    reader = Reader(source.files, prepare, threads or len(os.sched_getaffinity(0)), ahead=2 * batch_size)
    for batch in batches(iter(reader), batch_size):
        names = [name for name, _ in batch]
        for number, meter in enumerate(meters):
            meter.take(names, [prepared[number] for _, prepared in batch])
        on_progress(len(batch))
    reader.refuse_broken()


def of_size(picture: Image.Image, size: int) -> Image.Image:
    """A generated picture in RGB. Raises PicturesError where it is not `size` pixels square."""
    if picture.size != (size, size):
        width, height = picture.size
        raise PicturesError(f"{width}x{height} px, where {size}x{size} are scored")
    return picture.convert("RGB")


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    while batch := list(islice(items, size)):
        yield batch
