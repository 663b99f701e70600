"""What clients may ask for, and that every refusal names the field, what was found and what is allowed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bksdm_runtime.request import Request, RequestError
from bksdm_runtime.served_request import DTYPES, FIELDS, Limits, LimitsError, filled, read

LIMITS = Limits(sizes=((512, 512), (512, 768)), max_steps=50, steps=25, guidance_scale=7.5)


def arrays(**values: Any) -> dict[str, NDArray[np.generic]]:
    return {name: np.array([value], DTYPES[FIELDS[name].datatype]) for name, value in values.items()}


def test_what_is_left_out_is_filled_in() -> None:
    fields = filled(arrays(prompt=b"a red apple", seed=2**64 - 1), LIMITS)
    assert fields.keys() == FIELDS.keys()
    assert all(array.shape == (1,) for array in fields.values())
    order = read(fields, LIMITS)
    assert order.request == Request(
        "a red apple", seed=2**64 - 1, steps=25, guidance_scale=7.5, height=512, width=512, sampler="pndm"
    )
    assert (order.format, order.preview) == ("png_b64", False)


def test_a_seed_that_is_left_out_is_drawn() -> None:
    seeds = {read(filled(arrays(prompt=b""), LIMITS), LIMITS).request.seed for _ in range(8)}
    assert len(seeds) == 8


def test_zero_is_a_seed() -> None:
    assert read(filled(arrays(prompt=b"", seed=0), LIMITS), LIMITS).request.seed == 0


def test_what_is_given_is_kept() -> None:
    given = arrays(
        prompt="ein Apfel \N{RED APPLE}".encode(),
        negative_prompt=b"blurred",
        seed=1,
        steps=50,
        guidance_scale=7.1,
        height=512,
        width=768,
        sampler=b"euler",
        format=b"raw",
        preview=True,
    )
    order = read(filled(given, LIMITS), LIMITS)
    expected = {
        **asdict(Request("ein Apfel \N{RED APPLE}", "blurred", seed=1, steps=50, sampler="euler")),
        "guidance_scale": 7.1,  # and not what float32 makes of it
        "height": 512,
        "width": 768,
    }
    assert asdict(order.request) == expected
    assert (order.format, order.preview) == ("raw", True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": b"x" * 100_000}, "prompt must have at most 8,192 bytes, found 100,000"),
        ({"prompt": b"caf\xe9"}, "prompt is not valid UTF-8: byte 3 is 0xe9"),
        ({"prompt": b"a\0b"}, "prompt holds a NUL"),
        ({"negative_prompt": b"\xff"}, "negative_prompt is not valid UTF-8"),
        ({"steps": -3}, "steps must be a whole number from 1 to 50, found -3"),
        ({"steps": 0}, "steps must be a whole number from 1 to 50, found 0"),
        ({"steps": 51}, "from 1 to 50, found 51"),
        ({"guidance_scale": np.nan}, "guidance_scale must be a number from 1 to 1000 .*found nan"),
        ({"guidance_scale": np.inf}, "guidance_scale must be .*found inf"),
        ({"guidance_scale": 0.5}, "guidance_scale must be .*found 0.5"),
        ({"height": 513}, "height 513 and width 512 are not served: choose width x height 512x512 or 768x512"),
        ({"height": 768, "width": 512}, "height 768 and width 512 are not served"),
        ({"width": -1}, "width -1 are not served"),
        ({"sampler": b"lms"}, "sampler 'lms' is unknown: choose pndm"),
        ({"sampler": b"__import__('os')"}, "is unknown"),
        ({"format": b"/etc/passwd"}, "format '/etc/passwd' is unknown: choose png, png_b64, raw"),
    ],
)
def test_a_bad_value_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        filled(arrays(**{"prompt": b"a red apple", **given}), LIMITS)


def test_every_field_holds_one_value() -> None:
    with pytest.raises(RequestError, match="prompt must hold one value, found 0"):
        filled({"prompt": np.empty((0,), np.object_)}, LIMITS)
    with pytest.raises(RequestError, match="steps must hold one value, found 2"):
        filled({**arrays(prompt=b""), "steps": np.array([1, 2], np.int32)}, LIMITS)


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(RequestError, match="steps must be INT32, found int64"):
        filled({**arrays(prompt=b""), "steps": np.array([3])}, LIMITS)
    with pytest.raises(RequestError, match="prompt must be UTF-8 text, found int"):
        filled({"prompt": np.array([3], np.object_)}, LIMITS)


def test_an_unknown_field_and_a_missing_one_are_refused() -> None:
    with pytest.raises(RequestError, match="init_image is unknown: the fields are prompt"):
        filled({**arrays(prompt=b""), "init_image": np.array([b"/etc/passwd"], np.object_)}, LIMITS)
    with pytest.raises(RequestError, match="prompt is missing"):
        filled(arrays(steps=3), LIMITS)
    fields = filled(arrays(prompt=b""), LIMITS)
    del fields["seed"]
    with pytest.raises(RequestError, match="seed is missing"):
        read(fields, LIMITS)


def test_limits_go_through_a_configuration() -> None:
    assert Limits.from_parameters(LIMITS.to_parameters()) == LIMITS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sizes": ""}, "needs a size"),
        ({"sizes": "512"}, "size '512' is not WIDTHxHEIGHT"),
        ({"max_steps": "many"}, "no number"),
        ({"steps": "60"}, "found 60, 50"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(change: dict[str, str], says: str) -> None:
    with pytest.raises(LimitsError, match=says):
        Limits.from_parameters({**LIMITS.to_parameters(), **change})


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(LimitsError, match="parameter sizes is missing"):
        Limits.from_parameters({})
