"""A request is checked once, and what is wrong with it is said with the valid choices."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bksdm_runtime.request import Request, RequestError, check_size, check_tile


def test_the_size_is_known_once_it_is_chosen() -> None:
    assert Request("a", height=64, width=128).size == (64, 128)
    with pytest.raises(RequestError, match="the size is not chosen yet"):
        _ = Request("a", height=64).size


def test_the_guidance_is_known_once_it_is_chosen() -> None:
    assert Request("a", guidance_scale=3).guidance == 3
    with pytest.raises(RequestError, match="the guidance is not chosen yet"):
        _ = Request("a").guidance


def test_the_defaults_are_the_papers_protocol() -> None:
    request = Request("a cat")
    assert (request.steps, request.guidance_scale, request.sampler, request.seed) == (25, None, "pndm", 0)


@pytest.mark.parametrize(
    "valid",
    [
        {"prompt": ""},
        {"prompt": "苹果 🍎 “x”\n\t"},
        {"seed": 0},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"steps": 1},
        {"guidance_scale": 1},
        {"guidance_scale": 1.0},
        {"strength": 1},
        {"height": 8, "width": 4096},
    ],
)
def test_edges_are_valid(valid: dict[str, Any]) -> None:
    Request(**{"prompt": "a", **valid})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"prompt": None}, "prompt must be text, found NoneType"),
        ({"prompt": b"a"}, "prompt must be text, found bytes"),
        ({"prompt": "\udcff"}, "prompt is not valid Unicode text"),
        ({"negative_prompt": "a\0b"}, "negative_prompt holds a NUL character"),
        ({"seed": -(2**63) - 1}, "seed must be a whole number from -9223372036854775808 to 18446744073709551615"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 10**5000}, "seed must be .*, found a huge number"),
        ({"seed": 1.0}, "seed must be .*, found 1.0"),
        ({"seed": True}, "seed must be .*, found True"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, found 0"),
        ({"steps": -1}, "steps must be"),
        ({"steps": 1001}, "steps must be"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a number from 1 to 1000 .1 is no guidance., found nan"),
        ({"guidance_scale": math.inf}, "found inf"),
        ({"guidance_scale": 0}, "guidance_scale must be"),
        ({"guidance_scale": "7"}, "guidance_scale must be"),
        ({"strength": 0}, "strength must be"),
        ({"strength": 1.01}, "strength must be"),
        ({"strength": math.nan}, "strength must be"),
        ({"height": 0}, "height must be a whole number from 1 to 4096, found 0"),
        ({"width": 10**9}, "width must be a whole number from 1 to 4096"),
        ({"width": 64.0}, "width must be"),
        ({"sampler": "plms"}, r"sampler 'plms' is unknown: choose pndm, ddim, euler, dpmsolver\+\+"),
        ({"noise": "tpu"}, "noise 'tpu' is unknown: choose cpu or cuda"),
    ],
)
def test_a_wrong_value_is_one_sentence(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        Request(**{"prompt": "a", **wrong})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("pixels", "multiple", "nearest"),
    [
        (500, 64, "the nearest that work are 448 and 512"),
        (1, 64, "the nearest that works is 64"),
        (65, 32, "the nearest that work are 64 and 96"),
        (4095, 64, "the nearest that work are 4032 and 4096"),
    ],
)
def test_a_size_that_does_not_fit_names_the_nearest(pixels: int, multiple: int, nearest: str) -> None:
    with pytest.raises(RequestError, match=f"height {pixels} does not fit .* multiples of {multiple}: {nearest}$"):
        check_size("height", pixels, multiple)
    check_size("height", 512, multiple)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_interval": (-0.1, 1.0)}, "interval's start must be a number from 0 to 1"),
        ({"guidance_interval": (0.0, 1.5)}, "interval's end must be a number from 0 to 1"),
        ({"guidance_interval": (0.0, float("nan"))}, "interval's end must be a number"),
        ({"guidance_interval": (0.5, 0.5)}, "must end after it starts"),
        ({"vae_tile": 0}, "vae_tile must be a whole number from 1"),
        ({"cache_interval": 0}, "cache_interval must be a whole number from 1"),
        ({"cache_interval": 2.0}, "cache_interval must be a whole number"),
    ],
)
def test_what_may_be_saved_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request("a", **change)


def test_a_tile_is_a_multiple_and_wider_than_its_edges() -> None:
    check_tile(192, 64, 8)
    with pytest.raises(RequestError, match="vae_tile 200 does not fit this model, which takes multiples of 64"):
        check_tile(200, 64, 8)
    with pytest.raises(RequestError, match=r"vae_tile 128 is too small: .* must be 136 or more"):
        check_tile(128, 64, 8)
