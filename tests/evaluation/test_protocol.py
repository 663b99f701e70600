"""The two protocols, each against the steps of it written out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm_evaluation import inception
from bksdm_evaluation.protocol import CLEAN, PROTOCOLS, PUBLISHED

RANDOM = np.random.default_rng(0)
PICTURE = np.kron(RANDOM.integers(0, 256, (32, 32, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # [128, 128, 3]


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_published_is_a_jpeg_of_a_resized_jpeg(tmp_path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "full.jpg")
    Image.open(tmp_path / "full.jpg").resize((64, 64)).save(tmp_path / "small.jpg")  # as BK-SDM's scripts have it
    assert PUBLISHED.file_of(PICTURE, 64) == (tmp_path / "small.jpg").read_bytes()
    assert np.asarray(opened(CLEAN.file_of(PICTURE, 64))).shape == (64, 64, 3)


def test_clean_loses_nothing_but_by_the_resize() -> None:
    small = Image.fromarray(PICTURE).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(opened(CLEAN.file_of(PICTURE, 64))), np.asarray(small))
    np.testing.assert_array_equal(np.asarray(opened(CLEAN.file_of(PICTURE, 128))), PICTURE)


def test_real_pictures_come_to_the_same_size_in_the_same_way() -> None:
    picture = Image.fromarray(PICTURE)
    wide = picture.resize((200, 90))
    for protocol in PROTOCOLS.values():
        assert protocol.real(wide, 64).size == (64, 64)
        assert protocol.real(wide.convert("L"), 64).mode == "RGB"
        assert protocol.real(wide.convert("RGBA"), 64).mode == "RGB"
    kept = opened(PUBLISHED.file_of(PICTURE, 128))
    file = io.BytesIO()
    picture.save(file, "JPEG")
    once = np.asarray(PUBLISHED.real(opened(file.getvalue()), 128))
    np.testing.assert_array_equal(once, np.asarray(kept))


def test_clean_noise_belongs_to_its_caption() -> None:
    shape = (4, 8, 8)
    draw = CLEAN.noise(0, shape)
    first = draw(0, "a:a cat")
    np.testing.assert_array_equal(first, CLEAN.noise(0, shape)(17, "a:a cat"))
    assert not np.array_equal(first, draw(1, "b:a cat"))
    assert not np.array_equal(first, CLEAN.noise(1, shape)(0, "a:a cat"))
    assert abs(first.std() - 1) < 0.2


def test_published_noise_is_one_generators_draw_after_draw() -> None:
    """Numbers of torch.Generator("cuda") are held elsewhere; here, that a shard skips what others draw."""
    shape = (4, 8, 8)
    whole = PUBLISHED.noise(1234, shape)
    in_turn = [whole(i, "") for i in range(6)]
    shard = PUBLISHED.noise(1234, shape)
    for i in (1, 4, 5):
        np.testing.assert_array_equal(shard(i, "any"), in_turn[i])
    with pytest.raises(ValueError, match="draw 5 of a generator that is at 5"):
        shard(5, "")


def test_clean_input_of_inception_is_pillows_filter_without_rounding() -> None:
    """Pillow's bicubic weights (a = -1/2) written out in float64; where it enlarges, four pixels of each axis."""
    found = inception.prepare_clean(Image.fromarray(PICTURE))
    weights = np.zeros((299, 128))
    scale = 128 / 299
    for i in range(299):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - 2 + 0.5), 0), min(int(centre + 2 + 0.5), 128)
        x = np.abs(np.arange(low, high) + 0.5 - centre)
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0))
        weights[i, low:high] = row / row.sum()
    expected = np.einsum("ih,hwc,jw->cij", weights, PICTURE.astype(np.float64), weights).clip(0, 255)
    np.testing.assert_allclose(found, (expected - 128) / 128, rtol=0, atol=1e-6)  # measured 1.7e-7
    assert found.dtype == np.float32


def test_protocols_differ_where_scores_look() -> None:
    published = inception.prepare(torch.from_numpy(PICTURE).permute(2, 0, 1)[None])[0].numpy()
    assert np.abs(published - inception.prepare_clean(Image.fromarray(PICTURE))).mean() > 1e-3
