"""Optimization profiles: which shapes an engine takes, from sizes a user names and the one I/O contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bksdm_export.errors import ExportError
from bksdm_export.graphs import TIMESTEPS
from bksdm_runtime.bundle import Component, ModelFacts
from bksdm_runtime.plans import Profile, Range

UNETS = ("unet", "unet_shallow")


@dataclass(frozen=True)
class Span:
    """From the smallest to the largest, and the one to be fastest at."""

    smallest: int
    fastest: int
    largest: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """`2` or `1:2:8`. Raises ValueError."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f"{text!r} is no whole number, and no smallest:fastest:largest like 1:2:8")
        numbers = [int(part) for part in parts]
        return cls(*(numbers if len(numbers) == 3 else numbers * 3))

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.fastest <= self.largest:
            raise ValueError(f"{self} must grow from the smallest, which is at least 1, to the largest")

    def times(self, factor: int) -> Span:
        return Span(self.smallest * factor, self.fastest * factor, self.largest * factor)

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return str(self.smallest)
        return f"{self.smallest}:{self.fastest}:{self.largest}"


@dataclass(frozen=True)
class Sizes:
    """One profile. batch: pictures at once; height, width: pixels."""

    batch: Span
    height: Span
    width: Span


def sizes(
    batches: Sequence[Span], heights: Sequence[Span], widths: Sequence[Span], facts: ModelFacts
) -> tuple[Sizes, ...]:
    """One profile for each place in the lists; a list of one counts for all, an empty one is the model's own.

    Raises ExportError.
    """
    lists = [
        list(batches) or [Span(1, 1, 1)],
        list(heights) or [Span(facts.height, facts.height, facts.height)],
        list(widths) or [Span(facts.width, facts.width, facts.width)],
    ]
    count = max(len(one) for one in lists)
    for name, one in zip(("--batch", "--height", "--width"), lists, strict=True):
        if len(one) not in (1, count):
            raise ExportError(f"{len(one)} {name} for {count} profiles: give one for each, or one for all of them")
    for name, one in zip(("--height", "--width"), lists[1:], strict=True):
        for span in one:
            for pixels in (span.smallest, span.fastest, span.largest):
                if pixels % facts.size_multiple:
                    raise ExportError(f"{name} {span}: this model takes multiples of {facts.size_multiple} px")
    return tuple(Sizes(*(one[i if len(one) > 1 else 0] for one in lists)) for i in range(count))


def profiles(
    name: str, component: Component, facts: ModelFacts, wanted: Sequence[Sizes], *, unguided: bool
) -> tuple[Profile, ...]:
    """The profiles of one component, no two alike.

    A guided U-Net evaluation has two rows for a picture; unguided: profiles for one row a picture come besides. Text
    encoder and VAE take one at a time, as the pipeline feeds them.
    """
    found: list[Profile] = []
    for factor in (2, 1) if unguided and name in UNETS else (2,):
        for one in wanted:
            rows = one.batch.times(factor) if name in UNETS else Span(1, 1, 1)
            profile = {spec.name: _range(spec.axes, _axes(facts, one, rows)) for spec in component.inputs}
            if profile not in found:
                found.append(profile)
    return tuple(found)


def _axes(facts: ModelFacts, one: Sizes, rows: Span) -> Mapping[str, Span]:
    factor = facts.vae_scale_factor

    def latents(span: Span) -> Span:
        return Span(span.smallest // factor, span.fastest // factor, span.largest // factor)

    return {
        "batch": rows,
        TIMESTEPS: rows,
        "height": latents(one.height),
        "width": latents(one.width),
        "image_height": one.height,
        "image_width": one.width,
    }


def _range(axes: Sequence[str | int], spans: Mapping[str, Span]) -> Range:
    chosen = [spans[axis] if isinstance(axis, str) else Span(axis, axis, axis) for axis in axes]
    return Range(
        tuple(span.smallest for span in chosen),
        tuple(span.fastest for span in chosen),
        tuple(span.largest for span in chosen),
    )
