"""What PyTorch gives: whole pictures from diffusers' own pipeline, and each component's real inputs and outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from bksdm.checkpoint import Checkpoint
from bksdm_export.errors import ExportError
from bksdm_export.wrappers import Wrapper, wrap
from bksdm_runtime.bundle import ModelFacts
from bksdm_runtime.contract import DEEP
from bksdm_runtime.schedule import ScheduleError, make_schedule

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
    sampler: str = "pndm"


@dataclass(frozen=True)
class Picture:
    """image: [H, W, 3] float32 in [0, 1], before it is rounded to bytes."""

    request: PictureRequest
    image: NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One call of a component: inputs and an output by the names of `graphs`, float32 and int32."""

    label: str
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """cases: by component; the first of each is the smallest."""

    pictures: tuple[Picture, ...]
    cases: Mapping[str, tuple[Case, ...]]


SCHEDULERS: Mapping[str, Any] = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
}

# Quick pictures are at most this large. At 512 px the attention of one guided evaluation takes gigabytes in ONNX
# Runtime (tiny: 6.6 GB at the peak of its process, 2.7 GB near this size), more than an export may use.
QUICK_SIDE = 320
MORE_PROMPTS = ("a blue butterfly", "a slice of pizza", "a rocket in the sky", "a fox in the snow")
# Evaluations of each picture that are kept, spread over its steps: to compare with, and to calibrate int8 on.
KEPT, KEPT_FOR_INT8 = 3, 6


def choose_sampler(config: Mapping[str, object], steps: int = 25) -> str:
    """The first sampler of the runtime that takes these scheduler settings. Raises ExportError where none does."""
    refused = ""
    for sampler in SCHEDULERS:
        try:
            make_schedule(config, steps=steps, sampler=sampler)
        except ScheduleError as error:
            refused = refused or str(error)
        else:
            return sampler
    raise ExportError(f"the runtime cannot sample with the checkpoint's scheduler settings: {refused}")


def plan(
    facts: ModelFacts, depth: str = "quick", sampler: str = "pndm", *, more: bool = False
) -> tuple[PictureRequest, ...]:
    """The pictures that an export compares: a square one, and smaller ones off every grid, two of them at once.

    All at the model's own guidance but one, which is unguided. The small ones have odd numbers of latents in both
    directions, so that no level of the U-Net divides evenly.
    more: four further square ones, for what is learnt from them (see quantise) or is judged by many.
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
    if more:
        pictures += [
            PictureRequest(prompt, seed, side, side, steps, guidance) for seed, prompt in enumerate(MORE_PROMPTS, 7)
        ]
    return tuple(replace(picture, sampler=sampler) for picture in pictures)


def make_reference(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    requests: Sequence[PictureRequest],
    progress: Callable[[str], None] = log.info,
    *,
    features: bool = False,
    kept: int = KEPT,
) -> Reference:
    """Draw the pictures with diffusers' StableDiffusionPipeline in float32, and keep calls of every component.

    features: also of the U-Net's deep features, and of the shallow one on them. kept: evaluations of each picture.
    """
    latents: list[NDArray[np.float32]] = []
    unet_calls: list[Case] = []
    with torch.no_grad():
        for number, request in enumerate(requests, 1):
            progress(f"PyTorch draws picture {number} of {len(requests)}, {_size(request)}, to compare with")
            with _recorded(checkpoint.unet) as calls:
                latents.append(_draw_latents(checkpoint, facts, request))
            unet_calls += [
                Case(f"{_size(request)}, seed {request.seed}, evaluation {i + 1} of {len(calls)}", *calls[i])
                for i in sorted({round(part * (len(calls) - 1)) for part in np.linspace(0, 1, kept)})
            ]
        progress("PyTorch decodes and encodes them")
        mixed = _call(wrap(checkpoint, "unet"), "batch of 3, each at its own timestep", _mixed_batch(unet_calls))
        decoder, encoder = wrap(checkpoint, "vae_decoder"), wrap(checkpoint, "vae_encoder")
        decoded = [
            _call(decoder, _size(request), {"latent_sample": final})
            for request, final in zip(requests, latents, strict=True)
        ]
        pictures = [Picture(request, _image(case)) for request, case in zip(requests, decoded, strict=True)]
        pair = _two_of_a_size(latents)
        if pair is not None:
            decoded.append(_call(decoder, "2 at once", {"latent_sample": pair}))
        encoded = [_call(encoder, case.label, {"sample": np.clip(case.outputs["sample"], -1, 1)}) for case in decoded]
        text_encoder = wrap(checkpoint, "text_encoder")
        texts = ["", *dict.fromkeys(request.prompt for request in requests)]
        prompts = [
            _call(text_encoder, f"{n} prompt" + "s" * (n > 1), {"input_ids": _ids(checkpoint, texts[:n])})
            for n in (1, len(texts))
        ]
        prompts.append(_call(text_encoder, "3 of random tokens", {"input_ids": _random_ids(checkpoint)}))
        deep, shallow = _with_features(checkpoint, unet_calls) if features else ([], [])
    cases = {
        "text_encoder": prompts,
        "unet": [*unet_calls, mixed, *deep],
        **({"unet_shallow": shallow} if features else {}),
        "vae_decoder": decoded,
        "vae_encoder": encoded,
    }
    return Reference(
        tuple(pictures),
        {name: tuple(sorted(calls, key=_elements)) for name, calls in cases.items()},
    )


def _with_features(checkpoint: Checkpoint, calls: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Deep features of some calls of the U-Net, and calls of the shallow one: on those features, and on older ones.

    On the features of its own inputs the shallow one must give what diffusers' U-Net gave in its pipeline.
    """
    whole, shallow = wrap(checkpoint, "unet", features=True), wrap(checkpoint, "unet_shallow")
    deep: list[Case] = []
    cases: list[Case] = []
    for earlier, call in ((calls[0], calls[1]), (calls[-2], calls[-1])):  # of the first picture and of the last
        found = {}
        for one in (earlier, call):
            features = whole(*map(torch.from_numpy, one.inputs.values()))[1].numpy()
            deep.append(Case(f"{one.label}, features", one.inputs, {DEEP: features}))
            found[one.label] = features
        cases.append(Case(call.label, {**call.inputs, DEEP: found[call.label]}, call.outputs))
        older = {**call.inputs, DEEP: found[earlier.label]}
        cases.append(_call(shallow, f"{call.label}, features of an earlier one", older))
    return deep, cases


@torch.no_grad()
def draw(checkpoint: Checkpoint, facts: ModelFacts, request: PictureRequest) -> Picture:
    """One picture by diffusers' StableDiffusionPipeline in float32."""
    latents = _draw_latents(checkpoint, facts, request)
    return Picture(request, _image(_call(wrap(checkpoint, "vae_decoder"), "", {"latent_sample": latents})))


def _draw_latents(checkpoint: Checkpoint, facts: ModelFacts, request: PictureRequest) -> NDArray[np.float32]:
    """What the VAE decodes, [1, 4, h, w]. Noise comes from a CPU generator with the request's seed."""
    pipeline = diffusers.StableDiffusionPipeline(
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        unet=checkpoint.unet,
        scheduler=SCHEDULERS[request.sampler].from_config(dict(checkpoint.scheduler_config)),
        safety_checker=None,  # pyright: ignore[reportArgumentType] - None is how diffusers' own loader leaves these out
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
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
    latents: NDArray[np.float32] = result.images.numpy()
    return (latents / facts.scaling_factor).astype(np.float32)


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


def samples(case: Case) -> Iterator[Case]:
    """A case as single samples where each has its own timestep; the case itself otherwise."""
    count = len(case.inputs.get("timestep", [0]))
    if count == 1:
        yield case
        return
    for i in range(count):
        inputs = {name: array[i : i + 1] for name, array in case.inputs.items()}
        outputs = {name: array[i : i + 1] for name, array in case.outputs.items()}
        yield Case(f"{case.label}, sample {i + 1}", inputs, outputs)


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


def _two_of_a_size(latents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """The first two of one shape as a batch [2, 4, h, w]."""
    for i, one in enumerate(latents):
        for other in latents[i + 1 :]:
            if one.shape == other.shape:
                return np.concatenate([one, other])
    return None


def _random_ids(checkpoint: Checkpoint) -> NDArray[np.int32]:
    """[3, 77] from all of the vocabulary: prompts use a few dozen of its rows, and never all positions."""
    vocabulary = int(checkpoint.text_encoder.config.vocab_size)
    length = int(checkpoint.tokenizer.model_max_length)
    return np.random.default_rng(0).integers(0, vocabulary, (3, length)).astype(np.int32)


def _image(decoded: Case) -> NDArray[np.float32]:
    """[H, W, 3] in [0, 1]."""
    return np.clip(decoded.outputs["sample"][0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)


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
