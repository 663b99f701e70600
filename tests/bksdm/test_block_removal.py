"""The derived map against the published one, typed out here a second time from the published script's description."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bksdm.architecture import SD_V1_4, SD_V2_1, SD_V2_1_BASE, Architecture
from bksdm.block_removal import IncompatibleTeacher, blocks, compress, weight_map
from bksdm.checkpoint import Checkpoint
from bksdm.unet import build_unet, unet_config
from bksdm.variants import BASE, NOTHING, SMALL, TINY, Removal

RULES = {"base": BASE, "small": SMALL, "tiny": TINY}
V2_CHANGES = {
    "attention_head_dim": [2, 4, 8, 8],
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "upcast_attention": True,
}

# The oracle. Same key, same weight, except these prefixes (base and small; tiny).
_OUTER = {
    **{f"up_blocks.{i}.resnets.1.": f"up_blocks.{i}.resnets.2." for i in range(4)},
    **{f"up_blocks.{i}.attentions.1.": f"up_blocks.{i}.attentions.2." for i in (1, 2, 3)},
}
PUBLISHED_EXCEPTIONS = {
    "base": _OUTER,
    "small": _OUTER,
    "tiny": {
        **{f"up_blocks.{i}.resnets.0.": f"up_blocks.{i + 1}.resnets.0." for i in (0, 1, 2)},
        **{f"up_blocks.{i}.resnets.1.": f"up_blocks.{i + 1}.resnets.2." for i in (0, 1, 2)},
        **{f"up_blocks.{i}.attentions.0.": f"up_blocks.{i + 1}.attentions.0." for i in (0, 1, 2)},
        **{f"up_blocks.{i}.attentions.1.": f"up_blocks.{i + 1}.attentions.2." for i in (0, 1, 2)},
        "up_blocks.0.upsamplers.": "up_blocks.1.upsamplers.",
        "up_blocks.1.upsamplers.": "up_blocks.2.upsamplers.",
    },
}


def published_place(variant: str, key: str) -> str:
    for student, teacher in PUBLISHED_EXCEPTIONS[variant].items():
        if key.startswith(student):
            return teacher + key.removeprefix(student)
    return key


@pytest.mark.parametrize("variant", RULES)
@pytest.mark.parametrize("teacher", [SD_V1_4, SD_V2_1_BASE, SD_V2_1], ids=["v1", "v2-base", "v2-768"])
def test_full_size_map_is_the_published_one(teacher: Architecture, variant: str) -> None:
    derived = weight_map(teacher.unet, RULES[variant])
    with torch.device("meta"):
        student = build_unet(unet_config(teacher.unet, RULES[variant])).state_dict()
        whole = build_unet(teacher.unet).state_dict()
    assert derived == {key: published_place(variant, key) for key in student}
    assert len(set(derived.values())) == len(derived)
    assert all(student[key].shape == whole[name].shape for key, name in derived.items())


@pytest.mark.parametrize("variant", RULES)
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_every_student_tensor_is_its_teachers_at_the_published_place(
    build_mini: Callable[..., Checkpoint], family: str, variant: str
) -> None:
    changes = V2_CHANGES if family == "v2" else {}
    teacher = build_mini(seed=3, unet=changes).unet
    # Every tensor unlike every other one, so that a tensor from a wrong place cannot pass.
    for number, parameter in enumerate(teacher.parameters()):
        parameter.data.add_(number * 1e-3)
    whole = teacher.state_dict()
    student = compress(teacher, RULES[variant])
    tensors = student.state_dict()
    assert not any(tensor.is_meta for tensor in (*student.parameters(), *student.buffers()))
    for key, tensor in tensors.items():  # all of them: nothing is left at random initialisation
        assert torch.equal(tensor, whole[published_place(variant, key)]), key
        assert tensor.data_ptr() not in {other.data_ptr() for other in whole.values()}


@pytest.mark.parametrize("variant", RULES)
def test_the_student_runs(mini_checkpoint: Checkpoint, variant: str) -> None:
    student = compress(mini_checkpoint.unet, RULES[variant])
    assert not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        out = student(torch.ones(2, 4, 8, 8), torch.tensor([5, 900]), torch.ones(2, 77, 32)).sample
    assert out.shape == (2, 4, 8, 8)
    assert torch.isfinite(out).all()


def test_the_students_dtype_is_the_teachers(build_mini: Callable[..., Checkpoint]) -> None:
    student = compress(build_mini().unet.half(), TINY)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float16}


def test_rule_without_removal_is_the_identity(mini_checkpoint: Checkpoint) -> None:
    derived = weight_map(mini_checkpoint.unet.config, NOTHING)
    assert derived == {key: key for key in mini_checkpoint.unet.state_dict()}


def test_deeper_teachers_keep_first_layers_and_the_last_on_the_way_up() -> None:
    deep = {**SD_V1_4.unet, "layers_per_block": 4, "block_out_channels": [32, 64, 64, 64]}
    derived = weight_map(deep, Removal(layers=2, mid_block=True, stages=1))
    up = {key.split(".")[3]: name.split(".")[3] for key, name in derived.items() if ".resnets." in key and "up_" in key}
    assert up == {"0": "0", "1": "1", "2": "4"}
    assert derived["up_blocks.0.resnets.2.conv1.weight"] == "up_blocks.1.resnets.4.conv1.weight"


def test_teacher_whose_inner_stage_has_another_width_is_refused_with_key_and_shapes() -> None:
    uneven = {**SD_V1_4.unet, "block_out_channels": [32, 64, 64, 128]}
    with pytest.raises(
        IncompatibleTeacher,
        match=r"student up_blocks\.0\.resnets\.0\.norm1\.weight is \(128,\), but teacher up_blocks\.1\.\S+ is \(192,\)",
    ):
        weight_map(uneven, TINY)


def test_teacher_whose_tensors_belie_its_config_is_refused(build_mini: Callable[..., Checkpoint]) -> None:
    teacher = build_mini().unet
    teacher.conv_in.weight = torch.nn.Parameter(torch.zeros(32, 9, 3, 3))
    with pytest.raises(
        IncompatibleTeacher, match=r"conv_in\.weight is \(32, 4, 3, 3\), but teacher conv_in\.weight is \(32, 9, 3, 3\)"
    ):
        compress(teacher, BASE)


def test_teacher_that_lacks_a_tensor_is_refused_with_both_keys(build_mini: Callable[..., Checkpoint]) -> None:
    teacher = build_mini().unet
    del teacher.up_blocks[1].resnets[2]
    with pytest.raises(
        IncompatibleTeacher,
        match=r"student up_blocks\.0\.resnets\.1\.norm1\.weight \(128,\) needs "
        r"teacher up_blocks\.1\.resnets\.2\.norm1\.weight, which the teacher lacks",
    ):
        compress(teacher, TINY)


def test_blocks_account_for_every_parameter() -> None:
    parts = blocks(SD_V1_4.unet, TINY)
    assert sum(block.params for block in parts) == 859_520_964
    assert sum(block.params for block in parts if block.student) == 323_384_964
    removed = {block.name for block in parts if block.student is None}
    assert {
        "mid_block.resnets.0",
        "down_blocks.3.resnets.0",
        "down_blocks.2.downsamplers.0",
        "up_blocks.0.upsamplers.0",
    } < removed
    kept = {block.name: block.student for block in parts if block.student}
    assert kept["up_blocks.1.resnets.2"] == "up_blocks.0.resnets.1"
    assert kept["conv_in"] == "conv_in"
