"""Two sets of pictures of the same captions and noise, read once together: all that a gate asks about."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from bksdm_evaluation import gate, intervals
from bksdm_evaluation.errors import ClipError
from bksdm_evaluation.feature_set import FeatureSet
from bksdm_evaluation.gate import Pairs
from bksdm_evaluation.generation import differences
from bksdm_evaluation.intervals import Interval
from bksdm_evaluation.picture_files import PicturesError, Reader, refuse_missing
from bksdm_evaluation.picture_sets import PictureSet
from bksdm_evaluation.scores import Networks
from bksdm_evaluation.scoring import ClipMeter, FeatureMeter, InceptionScoreMeter, batches, of_size
from bksdm_evaluation.student import perceptual_distances


@dataclass(frozen=True, eq=False)
class Compared:
    """features: of both sets, their samples being of the same names. clip: of both, [N]. inception_scores: of both, of
    each split. None where not wanted."""

    pairs: Pairs
    features: tuple[FeatureSet, FeatureSet] | None
    clip: tuple[NDArray[np.float64], NDArray[np.float64]] | None
    inception_scores: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None


def refuse_others(a: PictureSet, b: PictureSet) -> None:
    """Raises PicturesError where the two were not drawn from the same captions and noise in the same way."""
    refuse_missing(list(a.files), b.files, "picture of the first set")
    refuse_missing(list(b.files), a.files, "picture of the second set")
    if a.generation is not None and b.generation is not None:
        first, second = (
            {key: value for key, value in one.items() if key != "model"} for one in (a.generation, b.generation)
        )
        if apart := list(differences(first, second)):
            raise PicturesError(f"the sets differ in more than what drew them: {'; '.join(apart[:3])}")
    if a.protocol != b.protocol:
        raise PicturesError(f"the sets are of two protocols, {a.protocol.name} and {b.protocol.name}")


def compare(
    a: PictureSet,
    b: PictureSet,
    lpips: nn.Module,
    networks: Networks,
    captions: Mapping[str, str],
    *,
    threads: int | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Compared:
    """Every pair through every network. Raises PicturesError, ClipError, TooFewPictures."""
    refuse_others(a, b)
    if networks.clip is not None and (without := [name for name in a.files if name not in captions]):
        raise ClipError(f"{len(without):,} pictures have no caption, {without[0]} among them: give --captions")
    deep = networks.inception
    of_features = [FeatureMeter(deep, a.protocol) for _ in range(2)] if deep is not None else []
    of_captions = [ClipMeter(networks.clip, captions) for _ in range(2)] if networks.clip is not None else []
    of_classes: list[InceptionScoreMeter] = []
    if networks.classes is not None:
        of_classes = [InceptionScoreMeter(networks.classes.logits, len(a.files)) for _ in range(2)]

    def prepare(name: str, picture: Image.Image) -> tuple[list[NDArray[np.uint8]], list[list[Any]]]:
        with Image.open(b.files[name]) as other:
            pair = [of_size(picture, a.size), of_size(other, b.size)]
        ready = [[meter.prepare(one) for meter, one in zip(two, pair, strict=True)] for two in _meters()]
        return [np.asarray(one) for one in pair], ready

    def _meters() -> list[list[Any]]:
        return [two for two in (of_features, of_captions, of_classes) if two]

    reader = Reader(a.files, prepare, threads or len(os.sched_getaffinity(0)), ahead=2 * batch_size)
    parts: list[Pairs] = []
    for batch in batches(iter(reader), batch_size):
        these = [name for name, _ in batch]
        first, second = (np.stack([one[0][side] for _, one in batch]) for side in range(2))  # [B, H, W, 3] each
        parts.append(gate.pairs_of(these, list(first), list(second), perceptual_distances(lpips, first, second)))
        for place, two in enumerate(_meters()):
            for side, meter in enumerate(two):
                meter.take(these, [one[1][place][side] for _, one in batch])
        on_progress(len(batch))
    reader.refuse_broken()
    pairs = gate.together(parts)
    features = (of_features[0].result(a.size), of_features[1].result(b.size)) if of_features else None
    clip = None
    if of_captions:
        clip_a, clip_b = (np.array([meter.cosines[name] for name in pairs.names]) for meter in of_captions)
        clip = clip_a, clip_b
    scores = (of_classes[0].scores(), of_classes[1].scores()) if of_classes else None
    return Compared(pairs, features, clip, scores)


def differences_of_scores(compared: Compared, reference: FeatureSet | None) -> dict[str, Interval]:
    """Second set less first, of every score that was measured; FID where there are enough pictures for one.

    KID and FID are of the sets' samples. Raises FeatureSetError where the reference was prepared otherwise."""
    found: dict[str, Interval] = {}
    if compared.features is not None and reference is not None:
        first, second = compared.features
        first.refuse_other(reference)
        a, b = first.sample.astype(np.float64), second.sample.astype(np.float64)
        if len(reference.sample):
            found["kid"] = intervals.of_kernel_distances(b, a, reference.sample.astype(np.float64))
        if len(a) > a.shape[1] * intervals.GROUPS / (intervals.GROUPS - 1):
            found["fid"] = intervals.of_frechet_distances(b, a, reference)
    if compared.clip is not None:
        found["clip"] = intervals.of_mean(compared.clip[1] - compared.clip[0])
    if compared.inception_scores is not None:
        first, second = compared.inception_scores
        found["inception score"] = intervals.of_splits(second - first)
    return found
