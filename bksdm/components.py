"""The parts of a checkpoint: built strictly from configuration and tensors, and checked for fitting together."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from bksdm import vocabulary, weights_file
from bksdm.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)

CLIP_PREFIX = "text_model."
# What a whole CLIP holds beside its text tower, and the position ids that old versions stored.
_NOT_THE_TEXT_TOWER = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
_SETTINGS_OF_OTHERS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim")  # SDXL, unCLIP, Kandinsky

Model = TypeVar("Model", UNet2DConditionModel, AutoencoderKL)


@dataclass(frozen=True)
class Components:
    """What every kind of checkpoint is made of; models in eval mode, float32, on the CPU."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, object]


def with_clip_prefix(key: str) -> str:
    """Restore the prefix that transformers >= 5.6 drops.

    transformers 4 takes a file without it for one in which every key is missing, warns, and runs a random text encoder.
    """
    return key if key.startswith(CLIP_PREFIX) else CLIP_PREFIX + key


def load_diffusers_model(kind: type[Model], folder: Path, *, allow_pickle: bool = False) -> Model:
    """A U-Net or VAE from its own folder (config.json and weights), every tensor in its place or CheckpointError."""
    config = read_config(folder / "config.json")
    if config.get("_class_name") != kind.__name__:
        raise CheckpointError(f"{folder} is a {config.get('_class_name')}, not a {kind.__name__}")
    choice = weights_file.choose(_names(folder), where=str(folder), allow_pickle=allow_pickle)
    weights_file.check(folder, choice)
    _say_if_half(folder, choice)
    try:
        with quiet_libraries():
            model, info = kind.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] - a pair, as asked for
                str(folder),
                variant=choice.variant,
                use_safetensors=not choice.pickled,  # a pickle is read with weights_only=True
                torch_dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as reason:  # nonsense in a config.json ends in any exception of the model's constructor
        raise CheckpointError(_why(kind, folder, config, choice, reason)) from reason
    for what in ("missing", "unexpected", "mismatched"):
        if keys := sorted(info[f"{what}_keys"]):
            raise CheckpointError(f"{folder} does not hold what its config.json describes: {what} {keys[0]}")
    return finite(model, folder)


def load_text_encoder(folder: Path, *, allow_pickle: bool = False) -> CLIPTextModel:
    """CLIP's text model from its own folder, with or without the text_model. prefix that transformers 5 dropped."""
    config = read_config(folder / "config.json")
    if config.get("model_type") != "clip_text_model":
        raise CheckpointError(f"{folder} is a {config.get('model_type')}, not a CLIP text model (clip_text_model)")
    choice = weights_file.choose(_names(folder), where=str(folder), allow_pickle=allow_pickle)
    weights_file.check(folder, choice)
    _say_if_half(folder, choice)
    tensors: dict[str, torch.Tensor] = {}
    for name in choice.files:
        if not name.endswith(".json"):
            tensors.update(weights_file.read(folder / name, allow_pickle=allow_pickle))
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return build_text_encoder(text_model(settings, folder / "config.json"), tensors, folder)


def text_model(settings: Mapping[str, Any], where: Path) -> CLIPTextModel:
    """CLIP's text model of this configuration, its weights on "meta". where: what an error calls the configuration."""
    try:
        with init_empty_weights(include_buffers=False), quiet_libraries():
            return CLIPTextModel(CLIPTextConfig(**settings))
    except Exception as reason:  # as above: transformers checks few of its settings
        raise CheckpointError(f"{where} does not describe a CLIP text model ({first_line(reason)})") from reason


def build_text_encoder(model: CLIPTextModel, tensors: Mapping[str, torch.Tensor], where: Path) -> CLIPTextModel:
    """`model` with exactly these tensors; none may be missing, left over, or of another shape."""
    expected = model.state_dict()
    prefixed = any(key.startswith(CLIP_PREFIX) for key in expected)
    found = {
        with_clip_prefix(key) if prefixed else key.removeprefix(CLIP_PREFIX): tensor
        for key, tensor in tensors.items()
        if not key.startswith(_NOT_THE_TEXT_TOWER) and not key.endswith("position_ids")
    }
    if difference := first_difference(_shapes(expected), _shapes(found)):
        raise CheckpointError(f"{where} does not hold what its config.json describes: {difference}")
    model.load_state_dict({key: tensor.float() for key, tensor in found.items()}, assign=True)
    return finite(model.eval(), where)


def first_difference(expected: Mapping[str, weights_file.Shape], found: Mapping[str, weights_file.Shape]) -> str | None:
    """The first key, in the model's own order, that is missing, of another shape or left over; None when all fit."""
    for key, shape in expected.items():
        if key not in found:
            return f"{key} {shape} is missing"
        if found[key] != shape:
            return f"{key} is {found[key]}, expected {shape}"
    left = sorted(set(found) - set(expected))
    return f"{left[0]} belongs to no part of the model" if left else None


def finite(model: nn.Module, where: object) -> Any:
    """`model` itself. Raises CheckpointError when a weight is NaN or infinite, or was never loaded."""
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"{where} lacks {key}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{where}: {key} holds {bad} NaN or infinite value(s): the weights are damaged")
    return model


def image_size(parts: Components, where: object) -> int:
    """Check that the parts fit together, and give the default height and width in pixels. Raises CheckpointError."""
    unet, vae, text = parts.unet.config, parts.vae.config, parts.text_encoder.config
    for setting in _SETTINGS_OF_OTHERS:
        if unet.get(setting) is not None:
            raise CheckpointError(
                f"{where} is not a Stable Diffusion 1 or 2 model: its U-Net has {setting} {unet[setting]!r}"
            )
    if unet["in_channels"] != unet["out_channels"]:
        raise CheckpointError(
            f"{where} is not a text-to-image model: its U-Net takes {unet['in_channels']} channels and gives "
            f"{unet['out_channels']} (9: inpainting, 8: instruct-pix2pix, 5: depth)"
        )
    if unet["in_channels"] != vae["latent_channels"]:
        raise CheckpointError(
            f"{where}: the U-Net works on {unet['in_channels']} latent channels, the VAE on {vae['latent_channels']}"
        )
    if unet["cross_attention_dim"] != text.hidden_size:
        raise CheckpointError(
            f"{where}: the U-Net expects a context {unet['cross_attention_dim']} wide, the text encoder gives "
            f"{text.hidden_size}: they belong to different models"
        )
    if text.max_position_embeddings != vocabulary.TOKENS:
        raise CheckpointError(f"{where}: the text encoder reads {text.max_position_embeddings} tokens, not 77")
    if text.vocab_size < len(parts.tokenizer):
        raise CheckpointError(
            f"{where}: the tokenizer has {len(parts.tokenizer)} tokens, the text encoder {text.vocab_size}"
        )
    if not isinstance(parts.scheduler_config.get("_class_name"), str):
        raise CheckpointError(f"{where}: the scheduler's configuration names no _class_name")
    sample = unet["sample_size"]
    if isinstance(sample, list | tuple) and len(set(sample)) == 1:
        sample = sample[0]
    if not isinstance(sample, int) or sample < 1:
        raise CheckpointError(f"{where}: the U-Net's sample_size is {sample!r}, expected one positive number")
    return sample * vae_scale(parts.vae)


def vae_scale(vae: AutoencoderKL) -> int:
    """Pixels per latent, in each direction: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as reason:
        raise CheckpointError(f"{path} is missing") from reason
    except (OSError, ValueError, RecursionError) as reason:
        raise CheckpointError(f"{path} is not readable JSON ({reason})") from reason
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own loading reports off the screen: what they warn about, we raise."""
    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def _say_if_half(folder: Path, choice: weights_file.Choice) -> None:
    if choice.variant:
        logger.warning("%s: only the half-precision file (%s) exists, so it is used", folder, choice.files[0])


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, weights_file.Shape]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _why(
    kind: type[UNet2DConditionModel | AutoencoderKL],
    folder: Path,
    config: dict[str, Any],
    choice: weights_file.Choice,
    reason: BaseException,
) -> str:
    try:
        with torch.device("meta"), quiet_libraries():
            model: nn.Module = kind.from_config(config)  # pyright: ignore[reportAssignmentType]
            expected = _shapes(model.state_dict())
    except Exception as wrong:  # any nonsense in a config.json ends in some exception of the model's constructor
        return f"{folder / 'config.json'} does not describe a {kind.__name__} ({first_line(wrong)})"
    if choice.pickled:
        return (
            f"{folder / choice.files[0]} cannot be read as plain tensors that fit its config.json: it is damaged, "
            "of another model, or holds objects that only an unsafe load makes: look for a .safetensors file of it"
        )
    if len(choice.files) != 1:
        return f"{folder} cannot be loaded ({first_line(reason)})"
    (file,) = choice.files
    difference = first_difference(expected, weights_file.shapes(folder / file)) or first_line(reason)
    return f"{folder} does not hold what its config.json describes: {difference}"
