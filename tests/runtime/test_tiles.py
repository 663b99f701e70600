"""Tiles against decoding at once, with decoders of which the right answer is known."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings, open_engine
from bksdm_runtime.image import from_image
from bksdm_runtime.tiles import OVERLAP, Array, _starts, decode_tiles

FACTOR = 8
ENGINES = ("vae_encoder", "vae_decoder")


def pointwise(latents: Array) -> Array:
    """A decoder that looks at one latent at a time: tiles must then be exact."""
    return np.tanh(latents[:, :3]).repeat(FACTOR, 2).repeat(FACTOR, 3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 40), (41, 97), (24, 100), (24, 24)])
def test_a_decoder_without_neighbours_is_exact(height: int, width: int) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, height, width)).astype(np.float32)
    found = decode_tiles(pointwise, latents, (24, 32), FACTOR)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, pointwise(latents), rtol=0, atol=5e-7)  # measured 1.2e-7


def test_every_tile_has_one_shape_and_all_are_covered() -> None:
    seen: list[tuple[int, ...]] = []

    def decode(latents: Array) -> Array:
        seen.append(latents.shape)
        return pointwise(latents)

    decode_tiles(decode, np.ones((1, 4, 50, 30), np.float32), (24, 24), FACTOR)
    assert set(seen) == {(1, 4, 24, 24)}
    assert len(seen) == 3 * 2


def test_what_fits_is_decoded_at_once() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 20, 24)).astype(np.float32)
    assert np.array_equal(decode_tiles(pointwise, latents, (24, 24), FACTOR), pointwise(latents))


@pytest.mark.parametrize("whole", range(24, 200, 7))
def test_neighbours_overlap_and_the_last_ends_with_the_whole(whole: int) -> None:
    starts = _starts(whole, 24)
    assert (starts[0], starts[-1] + 24) == (0, whole)
    assert all(one + 24 - other >= OVERLAP for one, other in itertools.pairwise(starts))


def test_between_two_tiles_the_picture_goes_smoothly_from_one_to_the_other() -> None:
    """Each tile comes out in one level of its own: no step in the blend is larger than the ramp's."""
    levels = iter((0.0, 1.0))

    def decode(latents: Array) -> Array:
        return np.full((1, 3, latents.shape[2] * FACTOR, latents.shape[3] * FACTOR), next(levels), np.float32)

    picture = decode_tiles(decode, np.zeros((1, 4, 24, 40), np.float32), (24, 24), FACTOR)
    row = picture[0, 0, 0]
    assert (row[0], row[-1]) == (0, 1)
    assert np.diff(row).min() >= 0
    assert np.diff(row).max() <= 1.01 / (OVERLAP * FACTOR)


def test_a_real_decoder_in_tiles_stays_close() -> None:
    """The demo's, on a mosaic of pictures, 512 px in four tiles of 288."""
    sheet = Path(__file__).parents[2] / "checkpoints" / "demo-teacher" / "samples-train.png"
    with Image.open(sheet) as picture:
        mosaic = picture.convert("RGB").crop((0, 0, 512, 512))
    bundle = bundles.load(bundles.demo())
    encoder, decoder = (open_engine(bundle, name, EngineSettings("onnxruntime", 1)) for name in ENGINES)
    latents = encoder({"sample": from_image(mosaic, 512, 512)})["latent_parameters"][:, :4].astype(np.float32)

    def decode(part: Array) -> Array:
        return decoder({"latent_sample": part})["sample"].astype(np.float32)

    whole, tiled = (
        np.clip((one / 2 + 0.5) * 255, 0, 255) for one in (decode(latents), decode_tiles(decode, latents, (36, 36), 8))
    )
    psnr = 10 * np.log10(255**2 / np.square(whole - tiled).mean())
    assert psnr > 30  # measured 35.9 dB
