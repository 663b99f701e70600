"""A small random CLIPModel against its own forward, and preprocessing against another writing of open_clip's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from bksdm import checkpoint
from bksdm_evaluation.clip_score import Clip, cleaned
from bksdm_evaluation.errors import ClipError
from bksdm_evaluation.scoring import ClipMeter

SIZES = [(64, 64), (63, 50), (50, 63), (33, 100), (256, 256), (97, 33), (640, 427)]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return checkpoint.load("demo").tokenizer


@pytest.fixture(scope="module")
def model(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "projection_dim": 24}
    vision = {**small, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def reference(image: Image.Image, side: int) -> np.ndarray:
    """torchvision's Resize(side, BICUBIC), CenterCrop(side), ToTensor, Normalize, in their own order of operations."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = side, int(side * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    top, left = int(round((new_h - side) / 2.0)), int(round((new_w - side) / 2.0))  # noqa: RUF046 - as torchvision has it
    array = array[top : top + side, left : left + side]
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy()).to(torch.float32).div(255)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return tensor.sub(mean).div(std).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_as_open_clip_prepares_them(model: CLIPModel, tokenizer, size: tuple[int, int]) -> None:
    found = Clip(model, tokenizer, "small").prepare(picture(size))
    assert found.shape == (3, 32, 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(picture(size), 32), rtol=0, atol=3e-7)  # measured 0


def test_cosines_are_those_of_the_models_own_forward(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    clip = Clip(model, tokenizer, "small")
    captions = ["a red apple", "two dogs on a beach, one of them asleep"]
    prepared = [clip.prepare(picture((40, 50), seed)) for seed in range(2)]
    ids = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids, pixel_values=torch.from_numpy(np.stack(prepared))).logits_per_image
    expected = logits.diagonal().numpy() / math.exp(float(model.logit_scale.detach()))
    np.testing.assert_allclose(clip.cosines(prepared, captions), expected, rtol=0, atol=2e-7)  # measured 3e-8
    alone = [clip.cosines(prepared[i : i + 1], captions[i : i + 1])[0] for i in range(2)]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=2e-7)  # measured 3e-8


def test_the_meter_keeps_each_pictures_cosine_by_name(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    meter = ClipMeter(Clip(model, tokenizer, "small"), {"a": "a cat", "b": "a dog"})
    meter.take(["b", "a"], [meter.prepare(picture((32, 32), seed)) for seed in range(2)])
    swapped = ClipMeter(meter.clip, {"a": "a dog", "b": "a cat"})
    swapped.take(["b", "a"], [meter.prepare(picture((32, 32), seed)) for seed in range(2)])
    assert set(meter.cosines) == {"a", "b"}
    assert meter.cosines != swapped.cosines


def test_captions_are_cleaned_as_open_clip_cleans_them() -> None:
    assert cleaned("  a\n\u2018cat\u2019 &amp;amp; a \u201cdog\u201d ") == "a 'cat' & a \"dog\""


def test_a_folder_opens_and_what_does_not_is_one_sentence(
    model: CLIPModel, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    clip = Clip.load(str(tmp_path / "small"), torch.device("cpu"))
    assert clip.name == "small"
    ours = Clip(model, tokenizer, "").cosines([clip.prepare(picture((32, 32)))], ["a cat"])
    np.testing.assert_allclose(clip.cosines([clip.prepare(picture((32, 32)))], ["a cat"]), ours, rtol=0, atol=1e-6)
    with pytest.raises(ClipError, match=r"the CLIP network .*gone cannot be loaded .*give its folder"):
        Clip.load(str(tmp_path / "gone"), torch.device("cpu"))
