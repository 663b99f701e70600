"""Our graphs against PyTorch: each component on real inputs, then whole pictures through the runtime."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from bksdm_export.errors import ExportError
from bksdm_export.likeness import Likeness, judge
from bksdm_export.reference import Case, Picture, PictureRequest, Reference
from bksdm_runtime.bundle import Bundle, BundleError
from bksdm_runtime.engine import Engine, EngineError, EngineSettings, open_engine
from bksdm_runtime.pipeline import Images, Pipeline
from bksdm_runtime.request import Request, RequestError
from bksdm_runtime.schedule import ScheduleError
from bksdm_runtime.tokenizer import Tokenizer, TokenizerError

# Whatever is installed: the tolerances below were measured on it, and another backend rounds differently.
ORT = EngineSettings(backend="onnxruntime")
CUDA = EngineSettings(backend="cuda")


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
_EXACT = Tolerance(  # 9.6e-7, 1.9e-6, 8.4e-7, 5.8e-6, 4.9e-6; pictures 0.00
    {"text_encoder": 5e-6, "unet": 1e-5, "unet_shallow": 1e-5, "vae_decoder": 3e-5, "vae_encoder": 2e-5}, picture=0.1
)
TOLERANCES: Mapping[tuple[str, str], Tolerance] = {
    ("fp32", "fp32"): _EXACT,
    ("fp32", "fp16"): _EXACT,  # against PyTorch with the same rounded weights
    ("fp32", "int8"): _EXACT,
    # 1.0e-3, 1.8e-3, 1.1e-3, 1.8e-3; pictures 0.04, and 0.35 with trained weights (the demo, 12 steps)
    ("fp16", "fp16"): Tolerance(
        {"text_encoder": 1e-2, "unet": 1e-2, "unet_shallow": 1e-2, "vae_decoder": 1e-2, "vae_encoder": 1e-2},
        picture=3.0,
    ),
    # int8 in U-Net and VAE decoder: measured 0.35 and 0.41 (demo), pictures 3.6. `likeness` is what counts; these
    # only catch a graph that is broken.
    ("int8", "int8"): Tolerance(
        {"text_encoder": 5e-6, "unet": 1.0, "unet_shallow": 1.0, "vae_decoder": 1.0, "vae_encoder": 2e-5}, picture=25.5
    ),
}


# What rounding the stored weights may change in PyTorch's own picture, mean difference in steps of 1/255: below what an
# eye sees. Measured: fp16 0.03 on the mini, 0 on the demo, whose weights are fp16's already; int8 0.49 on the demo.
ROUNDING = 3.0


@dataclass(frozen=True)
class Rounding:
    """What rounding the weights to how they are stored makes of PyTorch's own picture. mean: as PictureComparison's."""

    storage: str
    mean: float


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
    """All that was compared, and what is accepted.

    fused: the graphs in ONNX Runtime's own operators, by component; empty where there is no GPU to run them.
    rounding: None where no weights are rounded.
    likenesses: of the pictures of an approximate bundle (int8, tokens downsampled), on each backend.
    """

    tolerance: Tolerance
    components: Mapping[str, tuple[Comparison, ...]]
    pictures: tuple[PictureComparison, ...]
    rounding: Rounding | None = None
    likenesses: tuple[Likeness, ...] = ()
    fused: Mapping[str, tuple[Comparison, ...]] = field(default_factory=dict[str, tuple[Comparison, ...]])

    def worst(self, component: str) -> Comparison:
        return worst(self.components[component])

    def failures(self) -> list[str]:
        """What is over its tolerance, one sentence each, components first; empty when all is well."""
        found: list[str] = []
        for which, graphs in (("", self.components), (", fused for CUDA,", self.fused)):
            for name, comparisons in graphs.items():
                most, accepted = worst(comparisons), self.tolerance.components[name]
                if not most.error <= accepted:
                    differs = f"differs by {most.error:.1e} (accepted {accepted:.0e})"
                    found.append(f"{name}{which} {_cannot(most) or differs} at {most.label}{_with(most)}")
        for picture in self.pictures:
            if not picture.mean <= self.tolerance.picture:
                differs = f"differs by {picture.mean:.2f}/255 on average (accepted {self.tolerance.picture:g}/255)"
                which = f"the picture of {picture.picture.request.prompt!r}"
                found.append(f"{which} {_cannot(picture) or differs}{_with(picture)}")
        for one in self.likenesses:
            found += one.failures()
        if self.rounding is not None and not self.rounding.mean <= ROUNDING:
            finer = "fp32" if self.rounding.storage == "fp16" else "fp16"
            found.append(
                f"weights rounded to {self.rounding.storage} change PyTorch's own picture by "
                f"{self.rounding.mean:.2f}/255 on average (accepted {ROUNDING:g}/255): store them as {finer}"
            )
        return found


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """What is not a number is worse than anything."""
    return max(comparisons, key=lambda one: math.inf if math.isnan(one.error) else one.error)


def compare(label: str, found: NDArray[Any], expected: NDArray[Any]) -> Comparison:
    """Shape and dtype first, then values. What cannot be compared is infinitely wrong, never skipped."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        note = f"{found.dtype}{list(found.shape)} where PyTorch gives {expected.dtype}{list(expected.shape)}"
        return Comparison(label, math.inf, note)
    for whose, array in (("", found), ("PyTorch's own: ", expected)):
        if bad := int(array.size - np.isfinite(array).sum()):
            return Comparison(label, math.inf, f"{whose}{bad:,} of {array.size:,} values are NaN or infinite")
    largest = float(np.abs(expected).max())
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    return Comparison(label, difference / largest if largest else difference)


# Everything that prompts are made of; added tokens join it. Where transformers 4 and 5 disagree among themselves
# (ideographs, control characters; see the runtime's tokenizer) there is nothing to compare with.
TEXTS = (
    "",
    "a red apple on a white table",
    "A Golden  VASE, with (flowers): it's 1999 & 50% off!",
    "cr\u00e8me br\u00fbl\u00e9e, jalape\u00f1o, na\u00efve fa\u00e7ade",
    "\N{RED APPLE} \N{CAT FACE} <|startoftext|>",
    "a very long description of one apple, " * 12,
)


def verify_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The runtime's tokenizer, opened from `folder`, against the checkpoint's own, id for id. Raises ExportError."""
    try:
        ours = Tokenizer.open(folder)
    except TokenizerError as error:
        raise ExportError(f"the runtime cannot read the checkpoint's tokenizer: {error}") from error
    for text in (*TEXTS, *(f"a photo of {token}, framed" for token in tokenizer.get_added_vocab())):
        expected = np.asarray(tokenizer(text, padding="max_length", truncation=True)["input_ids"]).tolist()
        found = ours.encode(text).ids.tolist()
        if found != expected:
            first = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
            raise ExportError(
                f"the runtime's tokenizer is not the checkpoint's: token {first} of {text!r:.60} "
                f"is {found[first]}, the checkpoint's is {expected[first]}"
            )


def verify_component(
    bundle: Bundle, component: str, cases: Sequence[Case], settings: EngineSettings = ORT
) -> tuple[Comparison, ...]:
    """Run one graph through the runtime's own engine on every case."""
    compared: list[Comparison] = []
    engine: Engine | None = None
    for case in cases:
        try:
            engine = engine or open_engine(bundle, component, settings)
            outputs = engine(case.inputs)
        except EngineError as error:
            compared.append(Comparison(case.label, math.inf, str(error)))
            continue
        [(name, expected)] = case.outputs.items()
        compared.append(compare(case.label, outputs[name], expected))
    return tuple(compared)


def verify_pictures(
    bundle: Bundle, reference: Reference, settings: EngineSettings = ORT
) -> tuple[PictureComparison, ...]:
    """Draw every picture of the reference with the runtime's pipeline, those of one size in one batch."""
    requests = [_request(picture.request) for picture in reference.pictures]
    drawn: dict[int, NDArray[np.uint8]] = {}
    note = "it was not drawn"
    try:
        for item in Pipeline.open(bundle, settings).generate(requests):
            if isinstance(item, Images):
                drawn |= dict(zip(item.positions, item.pixels, strict=True))
    except (EngineError, BundleError, RequestError, ScheduleError, TokenizerError) as error:
        note = str(error)
    return tuple(compare_picture(picture, drawn.get(i), note) for i, picture in enumerate(reference.pictures))


def judge_pictures(
    bundle: Bundle, reference: Reference, on_ort: Sequence[PictureComparison], exact: Sequence[Picture]
) -> tuple[Likeness, ...]:
    """An approximate bundle's pictures on ONNX Runtime, and on OpenVINO where it is installed. Raises ExportError.

    exact: PyTorch's pictures of the reference's requests, without any approximation. OpenVINO multiplies what is not
    int8 in f32, though a processor may have bf16: the bound is of the approximation.
    """
    drawn = {ORT.backend: on_ort}
    if importlib.util.find_spec("openvino") is not None:
        settings = EngineSettings(backend="openvino", arithmetic="f32")
        drawn[settings.backend] = verify_pictures(bundle, reference, settings)
    return tuple(
        judge(backend, [(one.pixels, reference_pixels(its)) for one, its in zip(pictures, exact, strict=True)])
        for backend, pictures in drawn.items()
    )


def compare_picture(picture: Picture, pixels: NDArray[np.uint8] | None, note: str = "") -> PictureComparison:
    """Ours against PyTorch's, rounded to bytes in the same way."""
    expected = reference_pixels(picture)
    if pixels is None or pixels.shape != expected.shape:
        shape = note if pixels is None else f"{list(pixels.shape)} where PyTorch gives {list(expected.shape)}"
        return PictureComparison(picture, None, math.inf, math.inf, shape)
    if not np.isfinite(picture.image).all():
        return PictureComparison(picture, pixels, math.inf, math.inf, "PyTorch's own picture has NaN or infinity")
    difference = np.abs(pixels.astype(np.int16) - expected.astype(np.int16))
    return PictureComparison(picture, pixels, float(difference.mean()), float(difference.max()))


def reference_pixels(picture: Picture) -> NDArray[np.uint8]:
    """PyTorch's picture as bytes, [H, W, 3]; black where it is NaN."""
    return (np.nan_to_num(picture.image) * 255).round().astype(np.uint8)


def _request(request: PictureRequest) -> Request:
    return Request(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        sampler=request.sampler,
    )


def _cannot(compared: Comparison | PictureComparison) -> str:
    error = compared.error if isinstance(compared, Comparison) else compared.mean
    return "cannot be compared" if math.isinf(error) and compared.note else ""


def _with(compared: Comparison | PictureComparison) -> str:
    return f": {compared.note}" if compared.note else ""
