"""`bksdm-export --gate N`: N pictures by PyTorch and by the bundle, from the same noise, and a verdict on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm.checkpoint import Checkpoint
from bksdm.packages import PackageError
from bksdm.perceptual import Lpips
from bksdm_evaluation import gate
from bksdm_evaluation.artists import Artist, BundleArtist, Settings
from bksdm_evaluation.checkpoint_artist import CheckpointArtist
from bksdm_evaluation.protocol import CLEAN
from bksdm_evaluation.retrieval import ScoreError
from bksdm_evaluation.student import perceptual_distances
from bksdm_export.errors import ExportError
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.pipeline import Pipeline

STEPS = 25  # as published
_THINGS = (
    *("a red apple", "an orange cat", "a golden vase", "a blue butterfly", "a slice of pizza", "a green tractor"),
    *("a wooden boat", "an old man", "a white horse", "a bowl of soup", "a city street", "a snowy mountain"),
    *("a yellow bus", "two dogs", "a birthday cake", "a lighthouse"),
)
_WAYS = ("a photo of {}", "{}, oil painting", "{} at night", "a close-up of {}")

Pictures = Sequence[NDArray[np.uint8]]


def prompts(count: int) -> list[str]:
    """Different ones for as long as there are, 64; then the same again, from other noise."""
    all_of_them = [way.format(thing) for way in _WAYS for thing in _THINGS]
    return [all_of_them[i % len(all_of_them)] for i in range(count)]


def draw_exact(checkpoint: Checkpoint, count: int) -> Pictures:
    """PyTorch's pictures in fp32, at the model's own size. Raises ExportError."""
    return _draw(CheckpointArtist(checkpoint), count)


def judge(bundle: Bundle, exact: Pictures, settings: EngineSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """The verdict on the bundle's pictures beside PyTorch's, for JSON. Raises ExportError where it does not pass.

    Of an approximate bundle (int8, tokens downsampled) drift is measured and not judged: all its pictures may move.
    """
    manifest = bundle.manifest
    progress(f"drawing {len(exact)} pictures for the gate")
    try:
        ours = _draw(BundleArtist(Pipeline.open(bundle, settings)), len(exact))
        lpips = Lpips()
    except (EngineError, PackageError) as error:
        raise ExportError(f"the gate cannot be asked: {error}") from error
    pairs = gate.pairs_of(
        prompts(len(exact)), exact, ours, perceptual_distances(lpips, np.stack(exact), np.stack(ours))
    )
    bounds = gate.Bounds()
    if manifest.precision == "int8" or manifest.token_downsampling > 1:
        bounds = replace(bounds, drift=math.inf)
    found = gate.figures(pairs, gate.drifts(pairs), {}, bounds)
    if not found["passed"]:
        failed = [f"{one['what']} is {one['found']}" for one in found["questions"] if one["passed"] is False]
        raise ExportError(
            f"the bundle does not pass the gate of {len(exact)} pictures beside PyTorch: {'; '.join(failed)}"
        )
    return found


def _draw(artist: Artist, count: int) -> Pictures:
    noise = CLEAN.noise(CLEAN.seed, artist.latent_shape)
    texts = prompts(count)
    own = [noise(i, f"{i}:{text}") for i, text in enumerate(texts)]
    try:
        drawn = artist.draw(texts, own, Settings(STEPS, artist.guidance_scale, batch_size=1), lambda share: None)
        return list(drawn)
    except ScoreError as error:
        raise ExportError(str(error)) from error
