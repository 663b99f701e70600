"""What a client of a server may ask for: the fields of a request, their limits, and every check of them.

A server's parts, which each check what comes to them, share this one module. Nothing here is evaluated, and nothing is
ever a path: a client can name no file.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.request import Request, RequestError
from bksdm_runtime.schedule import SAMPLERS

FORMATS = ("png", "png_b64", "raw")
# A prompt of 77 tokens has some 400 bytes; what does not fit the model is dropped, and this much would all be.
MAX_PROMPT_BYTES = 8192
# What Triton's queue says when it is full and when a request's time is over, what our service says when it ends, and
# what Triton says of a model that is dead or not loaded (2.51).
_UNAVAILABLE = ("maximum queue size", "timeout expired", "no pictures any more", "not ready", "not healthy")


@dataclass(frozen=True)
class Field:
    """One field of a request. datatype: Triton's name for it; each holds one value."""

    name: str
    datatype: str
    meaning: str


FIELDS: Mapping[str, Field] = {
    field.name: field
    for field in (
        Field("prompt", "BYTES", "UTF-8 text"),
        Field("negative_prompt", "BYTES", "UTF-8 text"),
        Field("seed", "UINT64", "the same seed gives the same picture"),
        Field("steps", "INT32", "of the sampler"),
        Field("guidance_scale", "FP32", "1 is no guidance, and half the work"),
        Field("height", "INT32", "pixels"),
        Field("width", "INT32", "pixels"),
        Field("sampler", "BYTES", ", ".join(SAMPLERS)),
        Field("format", "BYTES", ", ".join(FORMATS)),
        Field("preview", "BOOL", "a small picture with every step"),
    )
}
REQUIRED = ("prompt",)
DTYPES: Mapping[str, type[np.generic]] = {
    "BYTES": np.object_,
    "UINT64": np.uint64,
    "INT32": np.int32,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}


class LimitsError(ValueError):
    """A server's parameters that make no sense; the message is one sentence."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts. sizes: height and width in pixels of each served shape, the default first.

    steps, guidance_scale: for requests that leave them out. Raises LimitsError on construction.
    """

    sizes: tuple[tuple[int, int], ...]
    max_steps: int
    steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        if not self.sizes:
            raise LimitsError("a server needs a size to serve")
        if not 1 <= self.steps <= self.max_steps <= 1000:
            raise LimitsError(f"steps must be from 1 to max_steps, at most 1000: found {self.steps}, {self.max_steps}")

    def to_parameters(self) -> dict[str, str]:
        """As the text parameters of a model's configuration."""
        return {
            "sizes": " ".join(shown(size) for size in self.sizes),
            "max_steps": str(self.max_steps),
            "steps": str(self.steps),
            "guidance_scale": repr(self.guidance_scale),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Limits:
        """Raises LimitsError."""
        try:
            sizes = tuple(read_size(text) for text in parameters["sizes"].split())
            max_steps, steps = int(parameters["max_steps"]), int(parameters["steps"])
            return cls(sizes, max_steps, steps, float(parameters["guidance_scale"]))
        except KeyError as error:
            raise LimitsError(f"parameter {error.args[0]} is missing") from None
        except LimitsError:
            raise
        except ValueError as error:
            raise LimitsError(f"a parameter is no number: {error}") from None


def is_unavailable(message: str) -> bool:
    """Whether an error of a server says that the same request may be served later.

    For where its code is lost: between front and core, which makes all of them INTERNAL, and where gRPC's UNAVAILABLE
    may come from no server at all.
    """
    return any(phrase in message.lower() for phrase in _UNAVAILABLE)


def shown(size: tuple[int, int]) -> str:
    """Height and width as people write them, width first."""
    return f"{size[1]}x{size[0]}"


def read_size(text: str) -> tuple[int, int]:
    """Height and width of "WIDTHxHEIGHT". Raises LimitsError."""
    width, cross, height = text.partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise LimitsError(f"size {text[:40]!r} is not WIDTHxHEIGHT, as in 512x512")
    return int(height), int(width)


@dataclass(frozen=True)
class Order:
    """A request that passed its checks. format: of the picture, one of FORMATS; preview: one with every step."""

    request: Request
    format: str
    preview: bool


def filled(given: Mapping[str, NDArray[np.generic]], limits: Limits) -> dict[str, NDArray[np.generic]]:
    """All fields, [1] each: those that a client gave, checked, and the defaults of those that it left out.

    A seed that is left out is drawn: `seed_used` of the answer says which. Raises RequestError.
    """
    height, width = limits.sizes[0]
    defaults: dict[str, object] = {
        "negative_prompt": b"",
        "seed": secrets.randbits(63),
        "steps": limits.steps,
        "guidance_scale": limits.guidance_scale,
        "height": height,
        "width": width,
        "sampler": Request.sampler.encode(),
        "format": b"png_b64",
        "preview": False,
    }
    values = {**defaults, **{name: _value(name, array) for name, array in given.items()}}
    arrays = {
        name: np.array([values[name]], DTYPES[field.datatype]) for name, field in FIELDS.items() if name in values
    }
    read(arrays, limits)
    return arrays


def read(fields: Mapping[str, NDArray[np.generic]], limits: Limits) -> Order:
    """The order that the fields make, of one value each. Raises RequestError: the field, its value, what is allowed."""
    for name in FIELDS:
        if name not in fields:
            raise RequestError(f"{name} is missing")
    values = {name: _value(name, array) for name, array in fields.items()}
    steps, height, width = (cast(int, values[name]) for name in ("steps", "height", "width"))
    if not 1 <= steps <= limits.max_steps:
        raise RequestError(f"steps must be a whole number from 1 to {limits.max_steps}, found {steps}")
    if (height, width) not in limits.sizes:
        raise RequestError(
            f"height {height} and width {width} are not served: "
            f"choose width x height {' or '.join(shown(size) for size in limits.sizes)}"
        )
    picture_format = _text("format", values["format"])
    if picture_format not in FORMATS:
        raise RequestError(f"format {picture_format[:40]!r} is unknown: choose {', '.join(FORMATS)}")
    # An FP32 such as 7.1 is meant as the decimal that it was written as.
    guidance = float(str(np.float32(cast(float, values["guidance_scale"]))))
    request = Request(
        prompt=_text("prompt", values["prompt"]),
        negative_prompt=_text("negative_prompt", values["negative_prompt"]),
        seed=cast(int, values["seed"]),
        steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        sampler=_text("sampler", values["sampler"])[:40],
    )
    return Order(request, picture_format, bool(values["preview"]))


def _value(name: str, array: NDArray[np.generic]) -> object:
    """The one value of a field, as Python's own. Raises RequestError."""
    if name not in FIELDS:
        raise RequestError(f"{name[:40]} is unknown: the fields are {', '.join(FIELDS)}")
    if array.size != 1:
        raise RequestError(f"{name} must hold one value, found {array.size}")
    wanted = DTYPES[FIELDS[name].datatype]
    if array.dtype != wanted:
        raise RequestError(f"{name} must be {FIELDS[name].datatype}, found {array.dtype}")
    return cast(object, array.item())


def _text(name: str, value: object) -> str:
    """UTF-8 bytes as text. Raises RequestError."""
    if not isinstance(value, bytes):
        raise RequestError(f"{name} must be UTF-8 text, found {type(value).__name__}")
    if len(value) > MAX_PROMPT_BYTES:
        raise RequestError(f"{name} must have at most {MAX_PROMPT_BYTES:,} bytes, found {len(value):,}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not valid UTF-8: byte {error.start} is 0x{value[error.start]:02x}") from None
