"""From a removal rule and a teacher's configuration to a student's U-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from bksdm.errors import IncompatibleTeacher
from bksdm.variants import Removal

# Settings that diffusers takes either once for all stages or as one value per stage. Those of the up path are listed
# from the innermost stage outwards, all others from the outermost inwards.
_PER_STAGE = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)
_PER_UP_STAGE = ("up_block_types", "reverse_transformer_layers_per_block")


def unet_config(teacher_config: Mapping[str, Any], removal: Removal) -> dict[str, Any]:
    """The configuration of the student that `removal` leaves of a teacher of any width, v1 or v2.

    teacher_config: what diffusers reads (`unet.config` or a config.json); its private entries ("_...") are left out.
    Raises IncompatibleTeacher when there is less to remove than the rule asks for.
    """
    config = {key: _plain(value) for key, value in teacher_config.items() if not key.startswith("_")}
    stages = len(config["down_block_types"])
    if removal.stages:
        if removal.stages >= stages:
            raise IncompatibleTeacher(f"the rule removes {removal.stages} stage(s), and this teacher has {stages}")
        for key in _PER_STAGE:
            if isinstance(config.get(key), list):
                config[key] = config[key][: -removal.stages]
        for key in _PER_UP_STAGE:
            if isinstance(config.get(key), list):
                config[key] = config[key][removal.stages :]
    if removal.layers:
        layers = config.get("layers_per_block", 2)
        fewest = min(layers) if isinstance(layers, list) else layers
        if removal.layers >= fewest:
            raise IncompatibleTeacher(
                f"the rule removes {removal.layers} layer(s) of every stage, and this teacher has layers_per_block "
                f"{layers}: it is a student already"
            )
        config["layers_per_block"] = (
            [count - removal.layers for count in layers] if isinstance(layers, list) else layers - removal.layers
        )
    if removal.mid_block:
        if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
            raise IncompatibleTeacher(
                "the rule removes the mid block, and this teacher has none: it is a student already"
            )
        config["mid_block_type"] = None
    return config


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net of this configuration, in eval mode; under `torch.device("meta")` it costs neither memory nor time."""
    return UNet2DConditionModel(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()


def count_params(config: Mapping[str, Any]) -> int:
    """Parameters of a U-Net of this configuration."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_unet(config).parameters())


def count_macs(config: Mapping[str, Any], *, latent: int = 64, tokens: int = 77) -> int:
    """Multiply-accumulates of one evaluation at batch 1: convolutions and linear layers, as the authors count them.

    latent: height and width of the latents (64 is 512 px). Attention's own matrix products are not in the figure.
    """
    macs = 0

    def add(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal macs
        weight: torch.Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        macs += output.numel() * math.prod(weight.shape[1:])  # [B, out, ...] times inputs per output

    with torch.device("meta"), torch.no_grad():
        unet = build_unet(config)
        for module in unet.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(add)
        sample = torch.empty(1, unet.config["in_channels"], latent, latent)
        context = torch.empty(1, tokens, unet.config["cross_attention_dim"])
        unet(sample, torch.empty(1), context)
    return macs


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
