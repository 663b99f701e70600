"""The demo family that ships: what it weighs, what travels with it, and that both forms are the same weights."""

from pathlib import Path

import numpy as np
import pytest

from bksdm import checkpoint
from bksdm_runtime import bundle as bundles
from bksdm_runtime.pipeline import Images, Pipeline, Request

LIMIT = 40_000_000  # bytes, each


def _weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bundle_and_checkpoint_are_within_their_size():
    assert _weight(bundles.demo()) <= LIMIT
    assert _weight(checkpoint.demo_folder()) <= LIMIT


def test_the_bundle_is_whole_and_its_weights_are_the_checkpoints():
    bundle = bundles.load(bundles.demo())
    assert (bundle.manifest.precision, bundle.manifest.storage) == ("fp32", "fp16")
    assert bundle.manifest.source == "demo"


def test_notices_travel_with_both():
    bundle = bundles.load(bundles.demo())
    loaded = checkpoint.load("demo")
    for notice in ((bundle.root / bundle.manifest.licence.file).read_text(encoding="utf-8"), loaded.licence.notice):
        assert "Microsoft Corporation" in notice
        assert "Miles Johnson" in notice


def test_the_checkpoint_comes_with_its_card():
    card = (checkpoint.demo_folder() / "README.md").read_text(encoding="utf-8")
    for said in ("bksdm-train teacher", "top-1", "Limits"):
        assert said in card


@pytest.mark.parametrize("prompt", ["a red apple", "a purple giraffe on the moon"])
def test_it_draws_on_a_white_ground(prompt):
    [images] = [e for e in Pipeline.open(bundles.demo()).generate([Request(prompt)]) if isinstance(e, Images)]
    assert images.requests[0].guidance_scale == 2  # the model's own, from its training to its pictures
    pixels = images.pixels[0].astype(float)
    corners = np.stack([pixels[:6, :6], pixels[:6, -6:]])
    assert corners.mean() > 200
    assert pixels.std() > 20
