"""PNG files say how they were made, in every script, and are written whole or not at all."""

from __future__ import annotations

import os
import re
import resource
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from bksdm_runtime.image import (
    ImageError,
    Provenance,
    from_image,
    open_image,
    read_request,
    save_png,
    to_uint8,
)
from bksdm_runtime.request import SEED_MAX, SEED_MIN, Request

PROVENANCE = Provenance(
    bundle="0123456789abcdef" * 4,
    variant="small",
    backend="onnxruntime",
    precision="fp32",
    version="0.1.0",
    batch_size=2,
    batch_index=1,
    threads=3,
    arithmetic="f32",
)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
REQUEST = Request("a red apple", seed=1, guidance_scale=7.5, height=16, width=24)


def chunks(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        return {name: str(text) for name, text in image.text.items()}


def test_pixels_round_as_diffusers_does() -> None:
    decoded = np.random.default_rng(1).uniform(-1.5, 1.5, (3, 3, 40, 56)).astype(np.float32)
    decoded[0, 0, 0, :4] = [-1, 1, 0, 1 / 255]  # ties and both ends
    ours = to_uint8(decoded)
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded), output_type="pil")
    assert ours.dtype == np.uint8
    for picture, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(expected))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (40, 72)])
def test_an_init_image_is_prepared_as_diffusers_does(width: int, height: int) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 70, 3), np.uint8))
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(picture, height=height, width=width)
    ours = from_image(picture, height, width)
    assert ours.shape == (1, 3, height, width)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16", "I", "LA", "PA", "YCbCr", "HSV"])
def test_an_init_image_of_any_mode_becomes_rgb(mode: str) -> None:
    assert from_image(Image.new(mode, (10, 10)), 16, 16).shape == (1, 3, 16, 16)


def levels(image: Image.Image) -> np.ndarray:
    """The picture as the pipeline sees it, back as 8-bit levels [H, W, 3]."""
    prepared = from_image(image, image.height, image.width)
    return np.rint((np.moveaxis(prepared[0], 0, 2) + 1) * 127.5).astype(int)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_a_16_bit_grey_picture_was_almost_white(tmp_path: Path, suffix: str) -> None:
    grey = np.array([[0, 128, 257, 32768], [40000, 65278, 65406, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
    with Image.open(tmp_path / f"grey.{suffix}") as file:
        assert file.mode == "I;16"
    expected = np.repeat(np.array([[0, 0, 1, 128], [156, 254, 254, 255]])[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(levels(open_image(tmp_path / f"grey.{suffix}")), expected)
    np.testing.assert_array_equal(levels(Image.fromarray(grey.astype(np.int32))), expected)
    np.testing.assert_array_equal(levels(Image.frombytes("I;16B", (4, 2), grey.astype(">u2").tobytes())), expected)


def test_a_16_bit_grey_picture_may_have_a_transparent_level(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768]], np.uint16)).save(tmp_path / "grey.png", transparency=0)
    np.testing.assert_array_equal(levels(open_image(tmp_path / "grey.png"))[0, :, 0], [255, 128])


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (np.zeros((2, 2), np.float32), "floating-point pixels, of unknown range"),
        (np.full((2, 2), 70_000, np.int32), "levels from 70000 to 70000: save it with 8 or 16 bits"),
        (np.full((2, 2), -1, np.int32), "levels from -1 to -1"),
    ],
)
def test_a_picture_whose_white_nobody_knows_was_black(pixels: np.ndarray, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        from_image(Image.fromarray(pixels), 16, 16)


def test_transparency_was_black(tmp_path: Path) -> None:
    red = np.zeros((1, 3, 4), np.uint8)
    red[0, :, 0], red[0, :, 3] = 255, [0, 51, 255]  # nothing, a fifth, and all of it
    expected = [[255, 255, 255], [255, 204, 204], [255, 0, 0]]
    np.testing.assert_array_equal(levels(Image.fromarray(red))[0], expected)
    grey = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(levels(grey)[0], [[255] * 3, [0] * 3])
    Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P").save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(levels(open_image(tmp_path / "p.png"))[0], [[255] * 3, [1] * 3])


@pytest.mark.parametrize("format_name", ["AVIF", "WEBP", "JPEG", "GIF", "TIFF"])
def test_a_damaged_file_of_a_plugin_is_one_sentence(tmp_path: Path, format_name: str) -> None:
    """Damaged AVIF raised RuntimeError, which no list of Pillow's exceptions held."""
    if format_name in ("AVIF", "WEBP") and not features.check(format_name.lower()):
        pytest.skip(f"needs a Pillow with {format_name}")
    path = tmp_path / "a.bin"
    Image.fromarray(PIXELS).save(path, format=format_name)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        for damaged in (whole[:place], whole[:place] + b"\xff\x00\xff\x00" + whole[place + 4 :]):
            path.write_bytes(damaged)
            try:
                open_image(path)
            except ImageError as error:
                refused += 1
                assert "\n" not in str(error)  # noqa: PT017 - most damage is refused, some is not noticed
    assert refused > 10


def test_any_failure_of_a_decoder_is_one_sentence_but_memory_running_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    failure: Exception = RuntimeError("Failed to decode frame 0: Decoding of color planes failed\nmore")

    def fail(self: Image.Image) -> None:
        raise failure

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ImageError, match=r"cannot be read as a picture: Failed to decode frame 0: [\w ]*$"):
        open_image(tmp_path / "a.png")
    failure = MemoryError()
    with pytest.raises(MemoryError):
        open_image(tmp_path / "a.png")


def test_pixels_and_request_come_back(tmp_path: Path) -> None:
    path = tmp_path / "apple.png"
    save_png(path, PIXELS, REQUEST, PROVENANCE)
    assert read_request(path) == (REQUEST, PROVENANCE)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    negative=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    seed=st.integers(SEED_MIN, SEED_MAX),
    guidance=st.floats(1, 1000),
)
def test_any_request_comes_back_exactly(tmp_path: Path, prompt: str, negative: str, seed: int, guidance: float) -> None:
    request = Request(prompt, negative, seed=seed, guidance_scale=guidance, height=16, width=24, noise="cuda")
    save_png(tmp_path / "any.png", PIXELS, request, PROVENANCE)
    assert read_request(tmp_path / "any.png") == (request, PROVENANCE)


def test_image_to_image_remembers_its_picture(tmp_path: Path) -> None:
    request = Request("a", guidance_scale=7.5, height=16, width=24, init_image=tmp_path / "été.png", strength=0.55)
    provenance = Provenance(**{**vars(PROVENANCE), "init_image": "ab" * 32})
    save_png(tmp_path / "b.png", PIXELS, request, provenance)
    assert read_request(tmp_path / "b.png") == (request, provenance)
    assert "Denoising strength: 0.55" in chunks(tmp_path / "b.png")["parameters"]


def test_what_was_saved_is_remembered(tmp_path: Path) -> None:
    request = Request(
        "a", guidance_scale=7.5, height=16, width=24, guidance_interval=(0.1, 0.8), cache_interval=3, vae_tile=256
    )
    save_png(tmp_path / "b.png", PIXELS, request, PROVENANCE)
    assert read_request(tmp_path / "b.png") == (request, PROVENANCE)
    assert "Guidance interval: 0.1-0.8, Cache interval: 3, VAE tile: 256" in chunks(tmp_path / "b.png")["parameters"]


def test_the_chunks_are_there_by_name(tmp_path: Path) -> None:
    request = Request(
        "a red apple", "blurry", seed=7, steps=20, guidance_scale=7.5, sampler="euler", height=16, width=24
    )
    save_png(tmp_path / "a.png", PIXELS, request, PROVENANCE)
    found = chunks(tmp_path / "a.png")
    parameters = found.pop("parameters")
    assert found == {
        "prompt": "a red apple",
        "negative_prompt": "blurry",
        "seed": "7",
        "steps": "20",
        "sampler": "euler",
        "guidance_scale": "7.5",
        "height": "16",
        "width": "24",
        "noise": "cpu",
        "guidance_interval": "0.0 1.0",
        "cache_interval": "1",
        "bundle": "0123456789abcdef" * 4,
        "variant": "small",
        "backend": "onnxruntime",
        "precision": "fp32",
        "batch_size": "2",
        "batch_index": "1",
        "threads": "3",
        "arithmetic": "f32",
        "Software": "bksdm 0.1.0",
    }
    assert parameters == (
        "a red apple\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 7, Size: 24x16, Model hash: 0123456789, Model: small, "
        "Version: bksdm 0.1.0"
    )


def test_parameters_parse_as_the_web_ui_parses_them(tmp_path: Path) -> None:
    """The expression is AUTOMATIC1111's re_param (modules/infotext_utils.py), applied to the last line as there."""
    request = Request(
        "苹果 on a “table”,\nSteps: many", guidance_scale=7.5, height=16, width=24, seed=SEED_MAX, sampler="dpmsolver++"
    )
    save_png(tmp_path / "a.png", PIXELS, request, PROVENANCE)
    *lines, last = chunks(tmp_path / "a.png")["parameters"].strip().split("\n")
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert "\n".join(lines) == request.prompt
    assert (found["Steps"], found["Sampler"], found["CFG scale"]) == ("25", "DPM++ 2M", "7.5")
    assert (found["Seed"], found["Size"], found["Model"]) == (str(SEED_MAX), "24x16", "small")


def test_a_long_prompt_comes_back(tmp_path: Path) -> None:
    request = Request("ñ apple " * 50_000, guidance_scale=2, height=16, width=24)
    save_png(tmp_path / "long.png", PIXELS, request, PROVENANCE)
    assert read_request(tmp_path / "long.png")[0] == request


def test_a_picture_of_someone_else_is_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    Image.fromarray(PIXELS).save(tmp_path / "plain.jpg")
    information = PngImagePlugin.PngInfo()
    information.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler")
    Image.fromarray(PIXELS).save(tmp_path / "web.png", pnginfo=information)
    for name in ("plain.png", "plain.jpg", "web.png"):
        with pytest.raises(ImageError, match="does not say how it was made: only a PNG written by bksdm-run does"):
            read_request(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("seed", "x", "says wrongly how it was made"),
        ("seed", str(2**64), "says wrongly how it was made: seed must be"),
        ("seed", "9" * 5000, "says wrongly how it was made"),
        ("guidance_scale", "nan", "says wrongly how it was made: guidance_scale must be"),
        ("sampler", "magic", "says wrongly how it was made: sampler 'magic' is unknown"),
        ("steps", None, "its steps is missing"),
        ("prompt", None, "its prompt is missing"),
        ("batch_size", "1000000000", "its batch or its threads make no sense"),
        ("batch_index", "2", "its batch or its threads make no sense"),
        ("threads", "0", "its batch or its threads make no sense"),
        ("threads", "1000000", "its batch or its threads make no sense"),
        ("threads", "auto", "says wrongly how it was made"),
        ("arithmetic", "f64", "says wrongly how it was made: arithmetic 'f64' is unknown"),
    ],
)
def test_damaged_texts_are_one_sentence(tmp_path: Path, name: str, text: str | None, match: str) -> None:
    save_png(tmp_path / "a.png", PIXELS, REQUEST, PROVENANCE)
    information = PngImagePlugin.PngInfo()
    for key, value in {**chunks(tmp_path / "a.png"), name: text}.items():
        if value is not None:
            information.add_itxt(key, value)
    Image.fromarray(PIXELS).save(tmp_path / "b.png", pnginfo=information)
    with pytest.raises(ImageError, match=match) as caught:
        read_request(tmp_path / "b.png")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_picture_of_before_the_arithmetic_was_kept_is_still_read(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, REQUEST, PROVENANCE)
    information = PngImagePlugin.PngInfo()
    for key, value in chunks(tmp_path / "a.png").items():
        if key != "arithmetic":
            information.add_text(key, value)
    Image.fromarray(PIXELS).save(tmp_path / "b.png", pnginfo=information)
    assert read_request(tmp_path / "b.png") == (REQUEST, replace(PROVENANCE, arithmetic="auto"))


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, Request("苹果", guidance_scale=2, height=16, width=24), PROVENANCE)
    whole = (tmp_path / "a.png").read_bytes()
    random = np.random.default_rng(3)
    damaged = [whole[:length] for length in range(0, len(whole), 37)]
    for _ in range(300):
        place = int(random.integers(len(whole)))
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
    for content in damaged:
        (tmp_path / "b.png").write_bytes(content)
        for read in (read_request, open_image):
            try:
                read(tmp_path / "b.png")
            except ImageError as error:
                message = str(error)
                assert "\n" not in message  # any other exception is the failure


@pytest.mark.parametrize("read", [read_request, open_image])
def test_no_picture_is_one_sentence(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(ImageError, match="there is no picture"):
        read(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        read(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        read(tmp_path / "text.png")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.fromarray(PIXELS).save(tmp_path / "big.png")
    with pytest.raises(ImageError, match=r"cannot be read as a picture: .*decompression bomb"):
        open_image(tmp_path / "big.png")


def test_a_picture_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, REQUEST, PROVENANCE)
    save_png(tmp_path / "a.png", 255 - PIXELS, REQUEST, PROVENANCE)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), 255 - PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o666 & ~mask


def test_a_full_disk_leaves_the_old_picture_and_no_part(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", PIXELS, REQUEST, PROVENANCE)
    before = (tmp_path / "a.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # writing past 4 kB fails, as on a full disk
    try:
        with pytest.raises(ImageError, match=r"a\.png cannot be written: File too large"):
            save_png(tmp_path / "a.png", noise, REQUEST, PROVENANCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_interrupt_while_writing_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Image.Image, file: object, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(tmp_path / "a.png", PIXELS, REQUEST, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.png cannot be written: No such file or directory"):
        save_png(tmp_path / "none" / "a.png", PIXELS, REQUEST, PROVENANCE)
