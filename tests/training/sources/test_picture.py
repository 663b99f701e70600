from __future__ import annotations

import io
import struct
import zlib
from math import ceil, floor

import numpy as np
import pytest
import torch
from PIL import Image
from PIL import features as pillow

from bksdm_runtime import image as runtime_image
from bksdm_training.sources import BrokenExample, prepare
from bksdm_training.sources.picture import FORMATS, decode, to_rgb


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def triangle(length: int, size: int) -> np.ndarray:
    """[size, length] float64: weights of a bilinear resize that widens its filter when it shrinks (antialias)."""
    scale = length / size
    support = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    weights = np.maximum(0, 1 - abs((np.arange(length) + 0.5 - centres[:, None]) / support))
    return weights / weights.sum(1, keepdims=True)


def half_even(numerator: int) -> int:
    """numerator / 2, halves to the even neighbour, as Python's round() that torchvision's center_crop calls."""
    below = numerator // 2
    return below if numerator % 2 == 0 or below % 2 == 0 else below + 1


def reference(pixels: np.ndarray, size: int, flip: bool) -> np.ndarray:
    """torchvision's Resize(size, BILINEAR), CenterCrop(size), hflip of a Pillow image: [3, size, size] float64."""
    height, width, _ = pixels.shape
    short, long = min(height, width), max(height, width)
    length = size * long // short  # int(size * long / short)
    new_height, new_width = (length, size) if width <= height else (size, length)
    top, left = half_even(new_height - size), half_even(new_width - size)
    rows, columns = triangle(height, new_height)[top : top + size], triangle(width, new_width)[left : left + size]
    square = np.einsum("oy,yxc->oxc", rows, np.einsum("ox,yxc->yoc", columns, pixels.astype(np.float64)))
    return np.moveaxis(square[:, ::-1] if flip else square, 2, 0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("width", "height"),
    [(64, 64), (100, 64), (64, 101), (97, 131), (640, 427), (33, 50), (7, 9), (511, 513), (300, 299), (67, 1000)],
)
def test_prepare_is_the_published_transform(width, height, flip):
    pixels = noise(width, height)
    got = prepare(Image.fromarray(pixels), 64, flip)
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.uint8, (3, 64, 64), True)
    # Pillow rounds to bytes after each of its two passes, half a level each: 1.00 at most, measured too
    np.testing.assert_allclose(got.numpy(), reference(pixels, 64, flip), rtol=0, atol=1.01)


def test_prepare_takes_a_square_of_the_right_size_as_it_is():
    pixels = noise(32, 32)
    assert np.array_equal(prepare(Image.fromarray(pixels), 32, False).numpy(), np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize(("width", "height"), [(1700, 100), (100, 1700), (1900, 64), (40, 1500)])
def test_a_strip_is_cropped_without_resizing_all_of_it(width, height):
    pixels = noise(width, height)
    got = prepare(Image.fromarray(pixels), 64, False)
    np.testing.assert_allclose(got.numpy(), reference(pixels, 64, False), rtol=0, atol=1.01)  # measured 0.996


def test_an_endless_strip_needs_no_memory_of_its_own():
    assert prepare(Image.new("RGB", (60_000, 1), (9, 9, 9)), 512, True).unique().tolist() == [9]


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16", "I"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_turns_to_rgb_as_init_images_do(mode):
    rgba = Image.fromarray(noise(20, 12, 4), "RGBA")
    if mode.startswith("I"):
        levels = np.linspace(0, 65535, 240).reshape(12, 20)
        image = Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = rgba.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "HSV") else rgba.convert(mode)
    assert image.mode == mode
    got = to_rgb(image)
    assert np.array_equal(np.asarray(got), np.asarray(runtime_image.to_rgb(image)))
    assert prepare(image, 8, False).shape == (3, 8, 8)


def test_transparent_pixels_are_white_half_transparent_ones_half():
    pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    got = np.asarray(to_rgb(Image.fromarray(pixels, "RGBA")))
    assert got.tolist() == [[[255, 255, 255], [200, 0, 0], [127, 127, 127]]]


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_transparent_colour_of_a_png_is_white(mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), {"L": 7, "P": 7, "RGB": (7, 7, 7)}[mode])
    if mode == "P":
        image.putpalette([value for level in range(256) for value in (level, level, level)])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert np.asarray(decode("x", file.getvalue())).tolist() == [[[255] * 3, [7] * 3]]


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_once(orientation):
    upright = Image.fromarray(noise(16, 8))
    # where a camera held so stores the picture: the inverse of what viewers do
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    decoded = decode("x", file.getvalue())
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))
    assert torch.equal(prepare(decoded, 8, False), prepare(upright, 8, False))
    with Image.open(file) as image:
        assert torch.equal(prepare(image, 8, False), prepare(upright, 8, False))


def test_a_broken_exif_block_does_not_cost_the_picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert decode("x", file.getvalue()).size == (8, 8)


def _png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises more than it holds."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty image"),
        (b"<html>404</html>", "unknown image format"),
        (_png_of(10_000, 10_000), "decompression bomb"),  # where Pillow only warns
        (_png_of(60_000, 60_000), "decompression bomb"),  # where it raises
        (_png_of(50, 50), "undecodable image"),
        (_png_of(0, 50), "unknown image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown image format"),
    ],
)
def test_what_is_no_picture_is_broken(content, reason):
    with pytest.raises(BrokenExample) as raised:
        decode("key", content)
    assert (raised.value.skip.key, raised.value.skip.reason) == ("key", reason)


def test_floating_point_pixels_are_broken():
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(file, "TIFF")
    with pytest.raises(BrokenExample, match="undecodable image: floating-point pixels"):
        decode("x", file.getvalue())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind):
    if kind == "WEBP" and not pillow.check("webp"):
        pytest.skip("this Pillow has no WebP")
    file = io.BytesIO()
    Image.new("RGB", (9, 5), (200, 30, 30)).save(file, kind)
    got = decode("x", file.getvalue())
    assert got.size == (9, 5)
    # measured: 2 levels, by JPEG at its default quality
    np.testing.assert_allclose(np.asarray(got), np.broadcast_to([200, 30, 30], (5, 9, 3)), rtol=0, atol=6)


@pytest.mark.parametrize(("number", "even"), [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
def test_the_references_halves_are_torchvisions(number, even):
    assert half_even(number) == even == round(number / 2)
    assert floor(number / 2) <= even <= ceil(number / 2)
