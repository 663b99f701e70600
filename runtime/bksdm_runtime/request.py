"""A request: everything that decides one picture, checked once, here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.schedule import SAMPLERS
from bksdm_runtime.tiles import OVERLAP

if TYPE_CHECKING:
    from PIL.Image import Image  # for the annotation alone: --help and imports stay free of Pillow

NOISES = ("cpu", "cuda")
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1  # what torch.Generator.manual_seed takes
# Past any size that the family was trained for; self-attention at 4096 px would want terabytes.
MAX_SIDE = 4096
MAX_GUIDANCE = 1000.0


class RequestError(ValueError):
    """A request that cannot be served; the message is one sentence that names the valid choices."""


@dataclass(frozen=True)
class Request:
    """One picture to make. Raises RequestError on construction when a value is out of range.

    prompt, negative_prompt: any text, "" too. seed: as torch takes it, -2**63 to 2**64 - 1.
    steps: sampler steps (PNDM evaluates the U-Net once more).
    guidance_scale: 1 (no guidance, half the work) or more; height, width: pixels; None for the bundle's own.
    sampler: one of schedule.SAMPLERS.
    init_image: starts from this picture, resized to the size; strength: in (0, 1], how much of it is redone.
    noise: "cpu" or "cuda", whose torch generator the seed belongs to.
    guidance_interval, cache_interval: work that may be saved, see evaluations.plan_evaluations; by default none is.
    vae_tile: side of the tiles, in pixels, that the picture is decoded in (see tiles), or None for all at once.
    latents: noise of unit variance to start from instead of the seed's, [C, h, w] float32, as diffusers' `latents`.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    sampler: str = "pndm"
    init_image: Path | Image | None = None
    strength: float = 0.8
    noise: str = "cpu"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = 1
    vae_tile: int | None = None
    latents: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels. Raises RequestError while they are left to the bundle."""
        if self.height is None or self.width is None:
            raise RequestError("the size is not chosen yet: give height and width")
        return self.height, self.width

    @property
    def guidance(self) -> float:
        """The guidance scale. Raises RequestError while it is left to the bundle."""
        if self.guidance_scale is None:
            raise RequestError("the guidance is not chosen yet: give guidance_scale")
        return self.guidance_scale

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            _check_text(name, text)
        _check_integer("seed", self.seed, SEED_MIN, SEED_MAX)
        _check_integer("steps", self.steps, 1, 1000)  # the family is trained on 1,000 timesteps
        for side, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None:
                _check_integer(side, pixels, 1, MAX_SIDE)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, 1.0, MAX_GUIDANCE, " (1 is no guidance)")
        _check_number("strength", self.strength, 0.001, 1.0, " (1 redoes everything)")
        if self.sampler not in SAMPLERS:
            raise RequestError(f"sampler {self.sampler!r} is unknown: choose {', '.join(SAMPLERS)}")
        if self.noise not in NOISES:
            raise RequestError(f"noise {self.noise!r} is unknown: choose {' or '.join(NOISES)}")
        for end, share in zip(("start", "end"), self.guidance_interval, strict=True):
            _check_number(f"the guidance interval's {end}", share, 0.0, 1.0, " (a share of the steps)")
        if not self.guidance_interval[0] < self.guidance_interval[1]:
            raise RequestError(
                f"the guidance interval must end after it starts, found {self.guidance_interval}: "
                "guidance_scale 1 is how to do without"
            )
        _check_integer("cache_interval", self.cache_interval, 1, 1000)
        if self.latents is not None:
            _check_latents(self.latents)
        if self.vae_tile is not None:
            _check_integer("vae_tile", self.vae_tile, 1, MAX_SIDE)


def check_size(side: str, pixels: int, multiple: int) -> None:
    """Refuse a side that is no multiple of `multiple`, naming the nearest that work. Raises RequestError."""
    if pixels % multiple:
        below = pixels - pixels % multiple
        nearest = [str(size) for size in (below, below + multiple) if 0 < size <= MAX_SIDE]
        works = "the nearest that work are" if len(nearest) > 1 else "the nearest that works is"
        raise RequestError(
            f"{side} {pixels} does not fit this model, which takes multiples of {multiple}: "
            f"{works} {' and '.join(nearest)}"
        )


def check_tile(pixels: int, multiple: int, factor: int) -> None:
    """Refuse a tile that the model cannot decode or that is narrower than its blended edges. Raises RequestError."""
    check_size("vae_tile", pixels, multiple)
    least = (2 * OVERLAP + 1) * factor
    if pixels < least:
        raise RequestError(f"vae_tile {pixels} is too small: its neighbours overlap it, so it must be {least} or more")


def check_latents(latents: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    """Refuse latents of another shape than the picture's. Raises RequestError."""
    if latents.shape != shape:
        raise RequestError(f"latents must be {list(shape)} for this picture, found {list(latents.shape)}")


def _check_latents(latents: object) -> None:
    if not isinstance(latents, np.ndarray) or cast("NDArray[np.generic]", latents).dtype != np.float32:
        raise RequestError("latents must be an array of float32")
    if not np.isfinite(cast("NDArray[np.float32]", latents)).all():
        raise RequestError("latents hold NaN or infinity")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} must be text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: bytes on the command line that are not UTF-8
        raise RequestError(f"{name} is not valid Unicode text: {ascii(text)[:60]}") from None
    if "\0" in text:
        raise RequestError(f"{name} holds a NUL character, which no picture file can carry")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, found {_shown(value)}")


def _check_number(name: str, value: object, low: float, high: float, note: str) -> None:
    # NaN compares false, and so is refused here too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}{note}, found {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"  # the interpreter refuses to print integers past 4,300 digits
    return repr(value)[:60]
