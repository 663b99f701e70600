"""Block removal: which teacher weight becomes which student weight, derived from the rule, and the student it gives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from bksdm.errors import IncompatibleTeacher
from bksdm.unet import build_unet, unet_config
from bksdm.variants import Removal, Variant

__all__ = ["Block", "IncompatibleTeacher", "blocks", "compress", "student_name", "weight_map"]

_UP_KEY = re.compile(r"up_blocks\.(\d+)\.(.+)")
_UP_LAYER = re.compile(r"(resnets|attentions)\.(\d+)\.(.+)")
# What is kept or removed as one: a layer of a stage, a stage's resampler, or a whole part outside the stages.
_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|\w+)\.")


@dataclass(frozen=True)
class Block:
    """One part of the teacher's U-Net. name: as diffusers' keys begin; student: its name there, None when removed."""

    name: str
    params: int
    student: str | None


def weight_map(teacher_config: Mapping[str, Any], removal: Removal) -> dict[str, str]:
    """Student key -> teacher key, for every tensor of the student.

    Down stages and everything outside the stages keep their names: layers go from the end and stages from the inside.
    Up stages are numbered from the inside, so removed stages shift them; in each, the first layers keep their index and
    the last stays the last. Raises IncompatibleTeacher, naming the first key that does not fit and both shapes.
    """
    student, teacher = _shapes(unet_config(teacher_config, removal)), _shapes(teacher_config)
    layers = teacher_config.get("layers_per_block", 2)
    per_stage = [layers] * len(teacher_config["down_block_types"]) if isinstance(layers, int) else list(layers)
    up_layers = per_stage[::-1]  # an up stage has one layer more than its mirror on the way down
    result = {key: _teacher_key(key, removal, up_layers) for key in student}
    _check(student, teacher, result)
    return result


def compress(teacher: UNet2DConditionModel, removal: Removal) -> UNet2DConditionModel:
    """The student that `removal` leaves of `teacher`: eval mode, the teacher's dtype, tensors of its own.

    Raises IncompatibleTeacher.
    """
    names = weight_map(teacher.config, removal)
    tensors = teacher.state_dict()
    with init_empty_weights(include_buffers=False):  # no time or memory for values that are overwritten below
        student = build_unet(unet_config(teacher.config, removal))
    _check(
        {key: tuple(tensor.shape) for key, tensor in student.state_dict().items()},
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        names,
    )
    student.load_state_dict({key: tensors[name].detach().clone() for key, name in names.items()}, assign=True)
    return student


def student_name(row: Variant, teacher_config: Mapping[str, Any]) -> str:
    """What the student of a v1 or v2 teacher is called under `row`'s rule. Raises IncompatibleTeacher for a v2 row and
    a teacher that is none."""
    is_v2 = bool(teacher_config.get("use_linear_projection"))
    if row.family == "v2" and not is_v2:
        raise IncompatibleTeacher(
            f"{row.name} is cut from a Stable Diffusion 2 teacher, and this is none: "
            f"use --variant {row.name.removeprefix('v2-')}"
        )
    return f"v2-{row.name}" if is_v2 and row.family == "v1" else row.name


def blocks(teacher_config: Mapping[str, Any], removal: Removal) -> tuple[Block, ...]:
    """Every part of the teacher in its own order, with what became of it. Raises IncompatibleTeacher."""
    kept = {name: key for key, name in weight_map(teacher_config, removal).items()}
    params: dict[str, int] = {}
    student: dict[str, str | None] = {}
    for name, shape in _shapes(teacher_config).items():
        block = _block(name)
        params[block] = params.get(block, 0) + torch.Size(shape).numel()
        student[block] = _block(kept[name]) if name in kept else None
    return tuple(Block(name, count, student[name]) for name, count in params.items())


def _teacher_key(key: str, removal: Removal, up_layers: list[int]) -> str:
    if not (found := _UP_KEY.fullmatch(key)):
        return key
    stage, rest = int(found[1]) + removal.stages, found[2]
    if layer := _UP_LAYER.fullmatch(rest):
        last = up_layers[stage]
        index = int(layer[2])
        if index == last - removal.layers:  # the student's last layer
            index = last
        rest = f"{layer[1]}.{index}.{layer[3]}"
    return f"up_blocks.{stage}.{rest}"


def _block(key: str) -> str:
    found = _BLOCK.match(key)
    return found[1] if found else key


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build_unet(config).state_dict().items()}


def _check(
    student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> None:
    for key, name in names.items():
        if name not in teacher:
            raise IncompatibleTeacher(f"student {key} {student[key]} needs teacher {name}, which the teacher lacks")
        if student[key] != teacher[name]:
            raise IncompatibleTeacher(f"student {key} is {student[key]}, but teacher {name} is {teacher[name]}")
