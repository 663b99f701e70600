"""The rule on a configuration, against the configuration files that the authors published."""

from __future__ import annotations

import pytest
import torch

from bksdm.architecture import SD_V1_4, SD_V2_1, SD_V2_1_BASE, Architecture
from bksdm.errors import IncompatibleTeacher
from bksdm.unet import build_unet, unet_config
from bksdm.variants import BASE, SMALL, TINY, Removal

THREE = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280],
}
FOUR = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
}
V1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False, "sample_size": 64}
V2 = {"cross_attention_dim": 1024, "use_linear_projection": True, "sample_size": 64}
HEADS = {"attention_head_dim": [5, 10, 20, 20]}
MID = {"mid_block_type": "UNetMidBlock2DCrossAttn"}
NO_MID = {"mid_block_type": None}
V2_768 = {"sample_size": 96, "upcast_attention": True}

# What unet_config*/bk_*/config.json of the published training code say.
PUBLISHED_CONFIGS = [
    (SD_V1_4, BASE, {**FOUR, **V1, **MID, "layers_per_block": 1}),
    (SD_V1_4, SMALL, {**FOUR, **V1, **NO_MID, "layers_per_block": 1}),
    (SD_V1_4, TINY, {**THREE, **V1, **NO_MID, "layers_per_block": 1}),
    (SD_V2_1_BASE, BASE, {**FOUR, **V2, **HEADS, **MID, "layers_per_block": 1}),
    (SD_V2_1_BASE, SMALL, {**FOUR, **V2, **HEADS, **NO_MID, "layers_per_block": 1}),
    (SD_V2_1_BASE, TINY, {**THREE, **V2, **NO_MID, "attention_head_dim": [5, 10, 20], "layers_per_block": 1}),
    (SD_V2_1, SMALL, {**FOUR, **V2, **HEADS, **NO_MID, **V2_768, "layers_per_block": 1}),
    (SD_V2_1, TINY, {**THREE, **V2, **NO_MID, **V2_768, "attention_head_dim": [5, 10, 20], "layers_per_block": 1}),
]


@pytest.mark.parametrize(("teacher", "removal", "expected"), PUBLISHED_CONFIGS)
def test_config_equals_the_published_students(
    teacher: Architecture, removal: Removal, expected: dict[str, object]
) -> None:
    config = unet_config(teacher.unet, removal)
    assert {key: config[key] for key in expected} == expected
    untouched = set(config) - {*expected, "mid_block_type"}
    assert {key: config[key] for key in untouched} == {key: teacher.unet[key] for key in untouched}


def test_config_of_a_built_unet_gives_the_same_student_as_a_plain_one() -> None:
    with torch.device("meta"):
        teacher = build_unet(SD_V2_1_BASE.unet)
        from_unet = build_unet(unet_config(teacher.config, TINY))
        from_dict = build_unet(unet_config(SD_V2_1_BASE.unet, TINY))
    for key in SD_V2_1_BASE.unet:
        assert from_unet.config[key] == from_dict.config[key], key
    assert from_unet.state_dict().keys() == from_dict.state_dict().keys()


def test_per_stage_settings_of_both_directions_follow_the_stages() -> None:
    teacher = {**SD_V1_4.unet, "layers_per_block": [2, 3, 3, 2], "only_cross_attention": [True, False, False, False]}
    student = unet_config(teacher, Removal(layers=1, mid_block=True, stages=1))
    assert student["layers_per_block"] == [1, 2, 2]
    assert student["only_cross_attention"] == [True, False, False]


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (Removal(layers=2), r"removes 2 layer.*layers_per_block 2"),
        (Removal(stages=4), r"removes 4 stage.*has 4"),
    ],
)
def test_less_to_remove_than_the_rule_asks_for_is_refused(removal: Removal, message: str) -> None:
    with pytest.raises(IncompatibleTeacher, match=message):
        unet_config(SD_V1_4.unet, removal)


def test_a_student_is_refused_as_a_teacher() -> None:
    with pytest.raises(IncompatibleTeacher, match="student already"):
        unet_config(unet_config(SD_V1_4.unet, SMALL), BASE)
    with pytest.raises(IncompatibleTeacher, match="this teacher has none"):
        unet_config(unet_config(SD_V1_4.unet, Removal(mid_block=True)), Removal(mid_block=True))
