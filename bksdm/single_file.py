"""A whole model in one file under the original (LDM) keys, as model-sharing sites pass it around.

diffusers' own loader converts the keys. It would fetch the configurations from the Hub; here they are read off the
tensors themselves, so that it works offline and for block-removed students too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from transformers import CLIPTextModel

from bksdm import vocabulary, weights_file
from bksdm.architecture import SD_V1_4, SD_V2_1_BASE, Architecture
from bksdm.components import Components, Model, build_text_encoder, finite, quiet_libraries, text_model
from bksdm.diffusers_folder import write_json
from bksdm.errors import CheckpointError, first_line
from bksdm.weights_file import Shape

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_HEAD_WIDTH = 64  # of CLIP's and of SD 2's attention heads; SD 1's U-Net has 8 heads instead, whatever their width
# modelspec.prediction_type, and beginnings of modelspec.architecture, as they are found in headers
_PREDICTIONS = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
_BLOCK_NUMBER = re.compile(rf"({re.escape(UNET)}(?:input|output)_blocks)\.(\d+)\.(\d+)\.(.+)")


def load(path: Path, *, architecture: Architecture | None = None, allow_pickle: bool = False) -> Components:
    """Every part of the model in `path`. Raises CheckpointError.

    architecture: what the keys cannot tell, the scheduler and the default size; needed for SD 2, where one file
    predicts noise and another velocity.
    """
    tensors = _dense(weights_file.read(path, allow_pickle=allow_pickle))
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    _refuse_others(found, path)
    is_v2 = f"{TEXT}model.token_embedding.weight" in found
    if architecture is None and is_v2:
        raise CheckpointError(
            f"{path} is a Stable Diffusion 2 file, and its keys do not say whether it predicts noise or velocity: "
            "name its variant, sd-v2.1-base (noise, 512 px) or sd-v2.1 (velocity, 768 px), or a v2 student",
            change="variant",
        )
    like = architecture or SD_V1_4
    _refuse_another_prediction(path, like)
    try:
        configs = {"unet": unet_config(found, like), "vae": vae_config(found, like)}
        text = text_config(found, SD_V2_1_BASE if is_v2 else SD_V1_4)
    except KeyError as reason:
        raise CheckpointError(f"{path} is not whole: it lacks {reason.args[0]}") from reason
    except (IndexError, ValueError) as reason:  # a tensor of fewer dimensions, a layer's number that is none
        raise CheckpointError(
            f"{path} is not a Stable Diffusion checkpoint: {reason} (its keys and shapes)"
        ) from reason
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            write_json(Path(folder) / name / "config.json", config)
        unet = _convert(UNet2DConditionModel, tensors, Path(folder), "unet", path)
        vae = _convert(AutoencoderKL, tensors, Path(folder), "vae", path)
    return Components(
        text_encoder=_text_encoder(tensors, text_model(text, path), path, is_v2=is_v2),
        unet=unet,
        vae=vae,
        tokenizer=vocabulary.clip("!" if is_v2 else "<|endoftext|>"),
        scheduler_config=dict(like.scheduler),
    )


def unet_config(shapes: Mapping[str, Shape], like: Architecture) -> dict[str, Any]:
    """A U-Net's configuration read off its tensors. Raises KeyError with the first key that is missing."""
    inside = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    stages: list[tuple[int, bool, int]] = [(0, False, 0)]  # width, attention?, layers
    number = 1
    while f"input_blocks.{number}.0.op.weight" in inside or f"input_blocks.{number}.0.out_layers.3.weight" in inside:
        if f"input_blocks.{number}.0.op.weight" in inside:
            stages.append((0, False, 0))
        else:
            width = inside[f"input_blocks.{number}.0.out_layers.3.weight"][0]
            stages[-1] = (width, f"input_blocks.{number}.1.norm.weight" in inside, stages[-1][2] + 1)
        number += 1
    widths = [width for width, _, _ in stages]
    attention = [has for _, has, _ in stages]
    projection = inside["input_blocks.1.1.proj_in.weight"]
    linear = len(projection) == 2  # SD 1 projects with 1x1 convolutions
    return {
        **like.unet,
        "_class_name": "UNet2DConditionModel",
        "in_channels": inside["input_blocks.0.0.weight"][1],
        "out_channels": inside["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": stages[0][2],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if "middle_block.0.in_layers.0.weight" in inside else None,
        "cross_attention_dim": inside["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, width // _HEAD_WIDTH) for width in widths] if linear else 8,
    }


def vae_config(shapes: Mapping[str, Shape], like: Architecture) -> dict[str, Any]:
    """A VAE's configuration read off its tensors. Raises KeyError with the first key that is missing."""
    stages = 0
    while f"{VAE}encoder.down.{stages}.block.0.conv1.weight" in shapes:
        stages += 1
    layers = 0
    while f"{VAE}encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    return {
        **like.vae,
        "_class_name": "AutoencoderKL",
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(stages)],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
    }


def text_config(shapes: Mapping[str, Shape], like: Architecture) -> dict[str, Any]:
    """A CLIP text model's configuration read off its tensors. Raises KeyError with the first key that is missing."""
    if like is SD_V1_4:
        bare = {key.replace("transformer.text_model.", "transformer."): shape for key, shape in shapes.items()}
        prefix = f"{TEXT}transformer."
        vocabulary_size, width = bare[f"{prefix}embeddings.token_embedding.weight"]
        layer, inner = f"{prefix}encoder.layers.", "mlp.fc1.weight"
    else:
        bare = dict(shapes)
        vocabulary_size, width = bare[f"{TEXT}model.token_embedding.weight"]
        layer, inner = f"{TEXT}model.transformer.resblocks.", "mlp.c_fc.weight"
    numbers = {int(key.removeprefix(layer).split(".")[0]) for key in bare if key.startswith(layer)}
    if like is not SD_V1_4:
        numbers.discard(23)  # SD 2 is conditioned on the penultimate layer: the last is never run
    return {
        **like.text_encoder,
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "num_hidden_layers": len(numbers),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "intermediate_size": bare[f"{layer}0.{inner}"][0],
    }


def _convert(kind: type[Model], tensors: dict[str, torch.Tensor], folder: Path, name: str, path: Path) -> Model:
    try:
        with quiet_libraries():
            model = kind.from_single_file(
                tensors,  # pyright: ignore[reportArgumentType] - a dict is taken too, and its annotation forgets it
                config=str(folder),
                subfolder=name,
                torch_dtype=torch.float32,
                local_files_only=True,
            )
    except Exception as reason:  # the converter trusts its file, and so ends in any exception
        raise CheckpointError(f"{path}: its {name} cannot be converted ({first_line(reason)})") from reason
    return finite(model.eval(), path)


def _text_encoder(tensors: dict[str, torch.Tensor], model: CLIPTextModel, path: Path, *, is_v2: bool) -> CLIPTextModel:
    try:
        # diffusers reads the width off the model
        found = convert_open_clip_checkpoint(model, tensors) if is_v2 else convert_ldm_clip_checkpoint(tensors)
    except Exception as reason:  # as above
        raise CheckpointError(f"{path}: its text encoder cannot be converted ({first_line(reason)})") from reason
    return build_text_encoder(model, found, path)


def _refuse_another_prediction(path: Path, like: Architecture) -> None:
    """Hold what the header says (github.com/Stability-AI/ModelSpec) against what the model would be sampled with."""
    entries = weights_file.metadata(path) if path.suffix == ".safetensors" else {}
    kind = entries.get("modelspec.architecture", "").lower()
    said = _PREDICTIONS.get(entries.get("modelspec.prediction_type", "").lower())
    said = said or _PREDICTIONS.get(next((name for name in _PREDICTIONS if kind.startswith(name)), ""))
    expected = like.scheduler["prediction_type"]
    if said not in (None, expected):
        raise CheckpointError(
            f"{path} says in its header that it predicts {said}, and the variant it is taken for predicts {expected}: "
            "name another variant, or convert it to a diffusers folder, whose scheduler says what it predicts",
            change="variant",
        )


def _refuse_others(shapes: Mapping[str, Shape], path: Path) -> None:
    if not any(key.startswith(UNET) for key in shapes):
        if "conv_in.weight" in shapes:
            raise CheckpointError(
                f"{path} is one part of a diffusers checkpoint: name its folder, with the config.json beside it"
            )
        if any("lora" in key for key in shapes):
            raise CheckpointError(f"{path} is a LoRA, a change to a model rather than a model")
        raise CheckpointError(f"{path} is not a Stable Diffusion checkpoint: it has no {UNET}* keys")
    if any(key.startswith("conditioner.") for key in shapes):
        raise CheckpointError(f"{path} is a Stable Diffusion XL checkpoint, not a Stable Diffusion 1 or 2 one")
    for part, what in ((VAE, "VAE"), (TEXT, "text encoder")):
        if not any(key.startswith(part) for key in shapes):
            raise CheckpointError(f"{path} is not whole: it has no {what} ({part}* keys)")


def _dense(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Number a student's blocks without gaps, as diffusers' converter counts them.

    Students converted by diffusers' script keep the numbers of a full U-Net (input_blocks 1, 3, 4, 6 ...), and their
    upsamplers stand alone where the removed layer was; those join the block before them.
    """
    parts: dict[str, dict[int, set[int]]] = {}
    for key in tensors:
        if found := _BLOCK_NUMBER.fullmatch(key):
            parts.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(int(found[3]))
    numbers: dict[tuple[str, int], int] = {}
    for side, blocks in parts.items():
        last = -1
        for number in sorted(blocks):
            if 0 in blocks[number]:
                last += 1
            numbers[side, number] = max(last, 0)

    def renamed(key: str) -> str:
        found = _BLOCK_NUMBER.fullmatch(key)
        return f"{found[1]}.{numbers[found[1], int(found[2])]}.{found[3]}.{found[4]}" if found else key

    return {renamed(key): tensor for key, tensor in tensors.items()}
