"""The scores of one set of pictures, with all that they depend on, as figures for JSON and as words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bksdm_evaluation import inception, inception_weights
from bksdm_evaluation.clip_score import PUBLISHED, Clip
from bksdm_evaluation.errors import ClipError
from bksdm_evaluation.feature_set import FeatureSet, FeatureSetError
from bksdm_evaluation.inception_score import ENOUGH, Score
from bksdm_evaluation.picture_files import PicturesError
from bksdm_evaluation.picture_sets import PictureSet
from bksdm_evaluation.retrieval import ScoreError
from bksdm_evaluation.scoring import ClipMeter, FeatureMeter, InceptionScoreMeter, Logits, Meter, run
from bksdm_evaluation.statistics import frechet_distance, kernel_distance


@dataclass(frozen=True)
class Classes:
    """What the Inception score is made of. network: the SHA-256 of its weights' file, or torch-fidelity."""

    logits: Logits
    network: str


@dataclass(frozen=True)
class Networks:
    """Those that are wanted, in eval mode, on one device; None for the others."""

    wanted: tuple[str, ...]
    inception: nn.Module | None
    classes: Classes | None
    clip: Clip | None


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass over a set gave, of what was wanted. clip: the cosine of each picture, by name."""

    pictures: PictureSet
    wanted: tuple[str, ...]
    features: FeatureSet | None
    inception_score: Score | None
    clip: Mapping[str, float] | None
    clip_network: str | None
    classes_network: str | None


def load_networks(
    wanted: Sequence[str], device: torch.device, clip: str | None, weights: Path | None = None
) -> Networks:
    """clip: a folder or a name on the Hub, None for the published one. weights: pytorch-fid's file, for FID, KID and
    IS; without it the packaged network and torch-fidelity's. Raises PackageError, ClipError, ScoreError."""
    of_file = inception_weights.load(weights).to(device) if weights is not None else None
    deep: nn.Module | None = None
    classes: Classes | None = None
    if {"fid", "kid"} & set(wanted):
        deep = of_file if of_file is not None else inception.load_network().to(device)
    if "is" in wanted:
        if of_file is None:
            classes = _fidelity(device)
        else:
            classes = Classes(partial(inception_weights.logits, of_file), of_file.sha256)
    return Networks(tuple(wanted), deep, classes, Clip.load(clip or PUBLISHED, device) if "clip" in wanted else None)


def _fidelity(device: torch.device) -> Classes:
    why = "the Inception score needs --inception FILE, pytorch-fid's weights, or pip install 'bksdm[fidelity]'"
    try:
        from bksdm_evaluation import fidelity
    except ModuleNotFoundError as error:
        raise ScoreError(f"{why}: {error.name} is missing") from error
    except RuntimeError as error:  # a torchvision of another torch
        raise ScoreError(f"{why}: {str(error).splitlines()[0]:.200}") from error
    return Classes(partial(fidelity.logits, fidelity.load_network(device)), "torch-fidelity")


def measure(
    pictures: PictureSet,
    networks: Networks,
    captions: Mapping[str, str],
    *,
    threads: int | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Measured:
    """Every picture once through every network. captions: by name, for the CLIP score.

    Raises PicturesError, ClipError, TooFewPictures."""
    meters: list[Meter] = []
    features = classes = clip = None
    if networks.inception is not None:
        meters.append(features := FeatureMeter(networks.inception, pictures.protocol))
    if networks.classes is not None:
        meters.append(classes := InceptionScoreMeter(networks.classes.logits, len(pictures.files)))
    if networks.clip is not None:
        if without := [name for name in pictures.files if name not in captions]:
            raise ClipError(f"{len(without):,} pictures have no caption, {without[0]} among them: give --captions")
        meters.append(clip := ClipMeter(networks.clip, captions))
    run(pictures.source, meters, threads=threads, batch_size=batch_size, on_progress=on_progress)
    return Measured(
        pictures,
        networks.wanted,
        features and features.result(pictures.size),
        classes and classes.result(),
        clip and clip.cosines,
        networks.clip and networks.clip.name,
        networks.classes and networks.classes.network,
    )


def figures(
    measured: Measured, reference: FeatureSet | None, *, allow_biased: bool = False, asked: bool = True
) -> dict[str, Any]:
    """All scores, for JSON. asked: the metrics were named, so that FID of too few pictures is refused, not left out.

    Raises FeatureSetError where the reference was prepared otherwise; PicturesError, TooFewPictures."""
    pictures = measured.pictures
    found: dict[str, Any] = {
        "protocol": pictures.protocol.name,
        "size": pictures.size,
        "pictures": len(pictures.files),
        "generation": pictures.generation,
        "scores": {},
    }
    scores = found["scores"]
    if measured.features is not None and reference is not None:
        ours = measured.features
        ours.refuse_other(reference)
        found["reference_pictures"] = reference.count
        found["network"] = ours.said["network"]
        if "kid" in measured.wanted:
            scores["kid"] = _kid(ours, reference)
        if "fid" in measured.wanted:
            why = _too_few(ours, reference)
            if why and not allow_biased and asked:
                raise PicturesError(f"{why}: ask for kid, or say --allow-biased")
            if allow_biased or not why:
                scores["fid"] = {"value": frechet_distance(ours, reference), "biased": bool(why)}
            else:
                found["left_out"] = f"fid: {why}"
    if measured.inception_score is not None:
        biased = len(pictures.files) < ENOUGH
        network = measured.classes_network
        scores["inception_score"] = {**asdict(measured.inception_score), "biased": biased, "network": network}
    if measured.clip is not None:
        cosines = np.array(list(measured.clip.values()))
        error = float(cosines.std(ddof=1) / len(cosines) ** 0.5) if len(cosines) > 1 else None
        scores["clip"] = {"value": float(cosines.mean()), "standard_error": error, "network": measured.clip_network}
    return found


def _kid(ours: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    if not len(reference.sample):
        raise FeatureSetError(
            "the reference is pytorch-fid's statistics, which hold no features: KID needs the pictures, or an .npz of "
            "bksdm-eval statistics"
        )
    return asdict(kernel_distance(ours.sample.astype(np.float64), reference.sample.astype(np.float64)))


def _too_few(ours: FeatureSet, reference: FeatureSet) -> str:
    """Why FID is biased past use; "" where it is not. A covariance of D features has full rank from D + 1 on."""
    for what, one in (("there are", ours), ("the reference has", reference)):
        if one.count is not None and one.count <= len(one.mean):
            return f"{what} {one.count:,} pictures, and FID of {len(one.mean):,} or fewer is biased upwards"
    return ""


def told(found: Mapping[str, Any]) -> str:
    """In words: never without the protocol."""
    scores = found["scores"]
    parts: list[str] = []
    if "kid" in scores:
        parts.append(f"KID {scores['kid']['value']:.5f} +- {scores['kid']['standard_error']:.5f}")
    if "fid" in scores:
        parts.append(f"FID {scores['fid']['value']:.2f}" + " (biased: too few pictures)" * scores["fid"]["biased"])
    if "inception_score" in scores:
        one = scores["inception_score"]
        parts.append(f"IS {one['mean']:.2f} +- {one['deviation']:.2f}" + " (biased: too few pictures)" * one["biased"])
        if one["network"] != "torch-fidelity" and not one["network"].startswith(inception_weights.PUBLISHED):
            parts[-1] += " (not by the published weights)"
    if "clip" in scores:
        parts.append(f"CLIP score {scores['clip']['value']:.4f} ({scores['clip']['network']})")
    counted = f"{found['pictures']:,} pictures"
    if found.get("reference_pictures"):
        counted += f" against {found['reference_pictures']:,}"
    said = f"{', '.join(parts)}: {found['protocol']} protocol, {found['size']} px, {counted}"
    return said + (f"\nleft out, {found['left_out']}" if "left_out" in found else "")
