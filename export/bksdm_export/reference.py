"""What PyTorch gives: whole pictures from diffusers' own pipeline, and each component's real inputs and outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from bksdm.checkpoint import Checkpoint
from bksdm_export.wrappers import Wrapper, wrap
from bksdm_runtime.bundle import ModelFacts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureRequest:
    """One picture to compare. Sizes in pixels."""

    prompt: str
    seed: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    negative_prompt: str = ""


@dataclass(frozen=True)
class Picture:
    """image: [H, W, 3] float32 in [0, 1], before it is rounded to bytes."""

    request: PictureRequest
    image: NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One call of a component: inputs and outputs by the names of `graphs`, float32 and int32."""

    label: str
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """cases: by component; the first of each is the smallest."""

    pictures: tuple[Picture, ...]
    cases: Mapping[str, tuple[Case, ...]]


# Quick pictures are at most this large. At 512 px the attention of one guided evaluation takes gigabytes in ONNX
# Runtime (tiny: 6.6 GB at the peak of its process, 2.7 GB near this size), more than an export may use.
QUICK_SIDE = 320


def plan(facts: ModelFacts, depth: str = "quick") -> tuple[PictureRequest, ...]:
    """The pictures that an export compares: a square one, and smaller ones off every grid, two of them at once.

    All at the model's own guidance but one, which is unguided. The small ones have odd numbers of latents in both
    directions, so that no level of the U-Net divides evenly.
    depth: "quick" stays within QUICK_SIDE and takes 4 steps, enough for PNDM's every branch (its last formula begins at
    the fifth evaluation), or 12 where the model is small; "full" takes 25 at the model's own size, and draws more.
    """
    unit = facts.size_multiple
    side = facts.height if depth == "full" else min(facts.height, QUICK_SIDE - QUICK_SIDE % unit)
    low, high = (unit * (side // unit * quarters // 4 | 1) for quarters in (2, 3))
    steps = 25 if depth == "full" else 12 if facts.height <= QUICK_SIDE else 4
    guidance = facts.guidance_scale
    pictures = [
        PictureRequest("a red apple on a white table", 0, side, side, steps, guidance),
        PictureRequest("a golden vase with flowers, oil painting", 1, low, high, steps, guidance, "blurry"),
        PictureRequest("an orange cat wearing a blue hat", 1234, low, high, steps, guidance),
        PictureRequest("snowy mountains at night", 2**32, high, low, steps, guidance_scale=1.0),
    ]
    if depth == "full":
        pictures += [
            PictureRequest("a green tractor in a field", 5, side, side, steps, guidance),
            PictureRequest("smiling face with sunglasses", 6, side, side, steps, guidance),
        ]
    return tuple(pictures)


def make_reference(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    requests: Sequence[PictureRequest],
    progress: Callable[[str], None] = log.info,
) -> Reference:
    """Draw the pictures with diffusers' StableDiffusionPipeline in float32, and keep calls of every component.

    The scheduler is PNDM with the checkpoint's settings; noise comes from a CPU generator with the request's seed.
    """
    pipeline = diffusers.StableDiffusionPipeline(
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        unet=checkpoint.unet,
        scheduler=cast(
            Any,  # PLMS whatever the settings are of, as the runtime's pndm
            diffusers.PNDMScheduler.from_config(dict(checkpoint.scheduler_config), skip_prk_steps=True),
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType] - None is how diffusers' own loader leaves these out
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    latents: list[NDArray[np.float32]] = []
    unet_calls: list[Case] = []
    with torch.no_grad():
        for number, request in enumerate(requests, 1):
            progress(f"PyTorch draws picture {number} of {len(requests)}, {_size(request)}, to compare with")
            with _recorded(checkpoint.unet) as calls:
                result: Any = pipeline(
                    prompt=request.prompt,
                    negative_prompt=request.negative_prompt,
                    height=request.height,
                    width=request.width,
                    num_inference_steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    generator=torch.Generator().manual_seed(request.seed),
                    output_type="latent",
                )
            latents.append(result.images.numpy() / np.float32(facts.scaling_factor))  # [1, 4, h, w]
            unet_calls += [
                Case(f"{_size(request)}, seed {request.seed}, evaluation {i + 1} of {len(calls)}", *calls[i])
                for i in sorted({0, len(calls) // 2, len(calls) - 1})
            ]
        progress("PyTorch decodes and encodes them")
        mixed = _call(wrap(checkpoint, "unet"), "batch of 3, each at its own timestep", _mixed_batch(unet_calls))
        decoded = [
            _call(wrap(checkpoint, "vae_decoder"), _size(request), {"latent_sample": final})
            for request, final in zip(requests, latents, strict=True)
        ]
        encoded = [
            _call(wrap(checkpoint, "vae_encoder"), case.label, {"sample": np.clip(case.outputs["sample"], -1, 1)})
            for case in decoded
        ]
        encoder = wrap(checkpoint, "text_encoder")
        texts = ["", *dict.fromkeys(request.prompt for request in requests)]
        prompts = [
            _call(encoder, f"{n} prompt" + "s" * (n > 1), {"input_ids": _ids(checkpoint, texts[:n])})
            for n in (1, len(texts))
        ]
    cases = {"text_encoder": prompts, "unet": [*unet_calls, mixed], "vae_decoder": decoded, "vae_encoder": encoded}
    images = [np.clip(case.outputs["sample"][0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1) for case in decoded]
    return Reference(
        tuple(Picture(request, image) for request, image in zip(requests, images, strict=True)),
        {name: tuple(sorted(calls, key=_elements)) for name, calls in cases.items()},
    )


Tensors = dict[str, NDArray[Any]]


@contextmanager
def _recorded(unet: torch.nn.Module) -> Iterator[list[tuple[Tensors, Tensors]]]:
    """While it lasts, every call of the U-Net is kept: (inputs, outputs) by the names of `graphs`."""
    calls: list[tuple[Tensors, Tensors]] = []

    def keep(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sample, timestep = args
        inputs = {
            "sample": sample.numpy().copy(),
            "timestep": timestep.reshape(1).numpy().astype(np.float32),  # diffusers gives one for the whole batch
            "encoder_hidden_states": kwargs["encoder_hidden_states"].numpy().copy(),
        }
        calls.append((inputs, {"out_sample": output[0].numpy().copy()}))

    handle = unet.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _mixed_batch(calls: Sequence[Case]) -> Tensors:
    """Three samples from different places of one trajectory, in one batch that no trajectory has."""
    first, later = calls[0].inputs, calls[1].inputs
    samples = [first["sample"][:1], later["sample"][-1:], later["sample"][:1]]
    contexts = [
        first["encoder_hidden_states"][:1],
        later["encoder_hidden_states"][-1:],
        first["encoder_hidden_states"][-1:],
    ]
    timesteps = [first["timestep"], later["timestep"], later["timestep"] + np.float32(0.25)]
    return {
        "sample": np.concatenate(samples),
        "timestep": np.concatenate(timesteps),
        "encoder_hidden_states": np.concatenate(contexts),
    }


def _ids(checkpoint: Checkpoint, texts: Sequence[str]) -> NDArray[np.int32]:
    tokens = checkpoint.tokenizer(list(texts), padding="max_length", truncation=True)
    return np.array(tokens["input_ids"], np.int32)  # [N, 77]


def _call(module: Wrapper, label: str, inputs: Tensors) -> Case:
    output = module(*(torch.from_numpy(array) for array in inputs.values()))
    return Case(label, inputs, {module.output: output.numpy()})


def _size(request: PictureRequest) -> str:
    return f"{request.height}x{request.width}"


def _elements(case: Case) -> int:
    return sum(array.size for array in case.inputs.values())
