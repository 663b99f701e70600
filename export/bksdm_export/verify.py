"""Our graphs against PyTorch: each component on real inputs, then whole pictures through the runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_export.reference import Case, Picture, PictureRequest, Reference
from bksdm_runtime.bundle import Bundle, BundleError
from bksdm_runtime.engine import Engine, EngineError, open_engine
from bksdm_runtime.pipeline import Images, Pipeline
from bksdm_runtime.request import Request, RequestError
from bksdm_runtime.schedule import ScheduleError


@dataclass(frozen=True)
class Tolerance:
    """What is accepted.

    components: largest difference, as a part of the largest value of the same tensor.
    picture: mean difference of the pixels, in steps of 1/255.
    """

    components: Mapping[str, float]
    picture: float


# By (precision, storage); 3 to 10 times the largest measured, on the mini model of the tests and on the true
# architectures with random weights. Measured, in the order of the components:
TOLERANCES: Mapping[tuple[str, str], Tolerance] = {
    # 9.6e-7, 1.8e-6, 5.8e-6, 4.9e-6; pictures 0.00
    ("fp32", "fp32"): Tolerance(
        {"text_encoder": 5e-6, "unet": 1e-5, "vae_decoder": 3e-5, "vae_encoder": 2e-5}, picture=0.1
    ),
    # What rounding the weights costs: 7.3e-4, 1.5e-3, 1.1e-3, 1.7e-3; pictures 0.03
    ("fp32", "fp16"): Tolerance(
        {"text_encoder": 3e-3, "unet": 1e-2, "vae_decoder": 1e-2, "vae_encoder": 1e-2}, picture=3.0
    ),
    # 1.0e-3, 1.8e-3, 1.1e-3, 1.8e-3; pictures 0.04, and 0.35 with trained weights (the demo, 12 steps)
    ("fp16", "fp16"): Tolerance(
        {"text_encoder": 1e-2, "unet": 1e-2, "vae_decoder": 1e-2, "vae_encoder": 1e-2}, picture=3.0
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One output compared. error: largest difference over largest value; infinite where nothing can be compared."""

    label: str
    error: float
    note: str = ""


@dataclass(frozen=True)
class PictureComparison:
    """One picture compared. pixels: ours, [H, W, 3] uint8, None when it could not be drawn.

    mean, largest: difference of the pixels in steps of 1/255; infinite where nothing can be compared.
    """

    picture: Picture
    pixels: NDArray[np.uint8] | None
    mean: float
    largest: float
    note: str = ""


@dataclass(frozen=True)
class Parity:
    """All that was compared, and what is accepted."""

    tolerance: Tolerance
    components: Mapping[str, tuple[Comparison, ...]]
    pictures: tuple[PictureComparison, ...]

    def worst(self, component: str) -> Comparison:
        return max(self.components[component], key=lambda comparison: comparison.error)

    def failures(self) -> list[str]:
        """What is over its tolerance, one sentence each, components first; empty when all is well."""
        found: list[str] = []
        for name in self.components:
            worst, accepted = self.worst(name), self.tolerance.components[name]
            if not worst.error <= accepted:
                found.append(
                    f"{name} differs by {worst.error:.1e} (accepted {accepted:.0e}) at {worst.label}{_with(worst)}"
                )
        for picture in self.pictures:
            if not picture.mean <= self.tolerance.picture:
                found.append(
                    f"the picture of {picture.picture.request.prompt!r} differs by {picture.mean:.2f}/255 on average "
                    f"(accepted {self.tolerance.picture:g}/255){_with(picture)}"
                )
        return found


def compare(label: str, found: NDArray[Any], expected: NDArray[Any]) -> Comparison:
    """Shape and dtype first, then values. What cannot be compared is infinitely wrong, never skipped."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        note = f"{found.dtype}{list(found.shape)} where PyTorch gives {expected.dtype}{list(expected.shape)}"
        return Comparison(label, math.inf, note)
    if not np.isfinite(found).all():
        bad = int(np.size(found) - np.isfinite(found).sum())
        return Comparison(label, math.inf, f"{bad:,} of {found.size:,} values are NaN or infinite")
    largest = float(np.abs(expected).max())
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    return Comparison(label, difference / largest if largest else difference)


def verify_component(bundle: Bundle, component: str, cases: Sequence[Case]) -> tuple[Comparison, ...]:
    """Run one graph through the runtime's own engine on every case."""
    compared: list[Comparison] = []
    engine: Engine | None = None
    for case in cases:
        try:
            engine = engine or open_engine(bundle, component)
            outputs = engine(case.inputs)
        except EngineError as error:
            compared.append(Comparison(case.label, math.inf, str(error)))
            continue
        [(name, expected)] = case.outputs.items()
        compared.append(compare(case.label, outputs[name], expected))
    return tuple(compared)


def verify_pictures(bundle: Bundle, reference: Reference) -> tuple[PictureComparison, ...]:
    """Draw every picture of the reference with the runtime's pipeline, those of one size in one batch."""
    requests = [_request(picture.request) for picture in reference.pictures]
    drawn: dict[int, NDArray[np.uint8]] = {}
    note = "it was not drawn"
    try:
        for item in Pipeline.open(bundle).generate(requests):
            if isinstance(item, Images):
                drawn |= dict(zip(item.positions, item.pixels, strict=True))
    except (EngineError, BundleError, RequestError, ScheduleError) as error:
        note = str(error)
    return tuple(compare_picture(picture, drawn.get(i), note) for i, picture in enumerate(reference.pictures))


def compare_picture(picture: Picture, pixels: NDArray[np.uint8] | None, note: str = "") -> PictureComparison:
    """Ours against PyTorch's, rounded to bytes in the same way."""
    expected = reference_pixels(picture)
    if pixels is None or pixels.shape != expected.shape:
        shape = note if pixels is None else f"{list(pixels.shape)} where PyTorch gives {list(expected.shape)}"
        return PictureComparison(picture, None, math.inf, math.inf, shape)
    difference = np.abs(pixels.astype(np.int16) - expected.astype(np.int16))
    return PictureComparison(picture, pixels, float(difference.mean()), float(difference.max()))


def reference_pixels(picture: Picture) -> NDArray[np.uint8]:
    """PyTorch's picture as bytes, [H, W, 3]."""
    return (picture.image * 255).round().astype(np.uint8)


def _request(request: PictureRequest) -> Request:
    return Request(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
    )


def _with(compared: Comparison | PictureComparison) -> str:
    return f": {compared.note}" if compared.note else ""
