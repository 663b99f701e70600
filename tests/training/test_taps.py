"""Feature taps: the published pairs, derived; features that carry a gradient, checkpointed or not."""

import pytest
import torch

from bksdm import block_removal
from bksdm.architecture import SD_V1_4, SD_V2_1
from bksdm.variants import BASE, SMALL, TINY
from bksdm_training.taps import Tap, Tapped, taps

WHOLE = [f"down_blocks.{i}" for i in range(4)] + [f"up_blocks.{i}" for i in range(4)]
# BK-SDM's training script, as published: (teacher, student)
PUBLISHED_TINY = [
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1", "down_blocks.1"),
    ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
    ("up_blocks.1", "up_blocks.0"),
    ("up_blocks.2", "up_blocks.1"),
    ("up_blocks.3", "up_blocks.2"),
]
REMOVALS = {"base": BASE, "small": SMALL, "tiny": TINY}


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    return noisy, torch.tensor([7, 900]), torch.randn(2, 77, 12, generator=generator)


@pytest.mark.parametrize("config", [SD_V1_4.unet, SD_V2_1.unet], ids=["v1", "v2"])
def test_the_published_taps_follow_from_the_rules(config):
    assert taps(config, BASE) == taps(config, SMALL) == tuple(Tap(name, name) for name in WHOLE)
    assert taps(config, TINY) == tuple(Tap(*pair) for pair in PUBLISHED_TINY)


def test_an_innermost_stage_without_attention_is_compared_at_its_last_residual():
    types = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    config = {**SD_V1_4.unet, "down_block_types": list(types)}
    assert taps(config, TINY)[2] == Tap("down_blocks.2.resnets.1", "down_blocks.2.resnets.0")


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("name", REMOVALS)
def test_pairs_have_the_same_shape_and_the_prediction_is_the_unets_own(narrow_unet, name, v2):
    teacher = narrow_unet(v2=v2).eval()
    student = block_removal.compress(teacher, REMOVALS[name])
    pairs = taps(teacher.config, REMOVALS[name])
    inputs = _inputs()
    with torch.no_grad():
        plain = [unet(*inputs).sample for unet in (teacher, student)]
        theirs = Tapped(teacher, [pair.teacher for pair in pairs])(*inputs)
        ours = Tapped(student, [pair.student for pair in pairs])(*inputs)
    assert torch.equal(theirs[0], plain[0])
    assert torch.equal(ours[0], plain[1])
    assert len(ours[1]) == len(theirs[1]) == len(pairs)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.shape == b.shape


def test_features_are_what_the_modules_give(narrow_unet):
    """Two taps whose outputs are known otherwise: the way in of the last stage, and what conv_norm_out receives."""
    unet = narrow_unet().eval()
    seen = {}
    unet.conv_norm_out.register_forward_pre_hook(lambda _, args: seen.update(up=args[0]))
    unet.mid_block.register_forward_pre_hook(lambda _, args: seen.update(down=args[0]))
    with torch.no_grad():
        _, (down, up) = Tapped(unet, ["down_blocks.3", "up_blocks.3"])(*_inputs())
    assert torch.equal(down, seen["down"])
    assert torch.equal(up, seen["up"])


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("name", REMOVALS)
def test_every_tap_has_a_gradient_with_gradient_checkpointing_on(narrow_unet, name, v2):
    """The published tap of tiny lies in a checkpointed region and was a constant there."""
    teacher = narrow_unet(v2=v2)
    names = [pair.student for pair in taps(teacher.config, REMOVALS[name])]
    gradients = {}
    for checkpointed in (False, True):
        student = Tapped(block_removal.compress(teacher, REMOVALS[name]).train(), names)
        if checkpointed:
            student.unet.enable_gradient_checkpointing()
        for index, tap in enumerate(names):
            student.zero_grad()
            student(*_inputs())[1][index].square().mean().backward()
            own = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
            gradients[checkpointed, tap] = own
            inside = [value for key, value in own.items() if f"unet.{tap}." in key]
            assert inside, tap
            # a bias before a normalisation has none; a tap's weights do
            assert max(value.abs().max().item() for value in inside) > 1e-6, tap
            assert own["unet.conv_in.weight"].abs().max() > 0, tap
    for tap in names:
        plain, again = gradients[False, tap], gradients[True, tap]
        assert plain.keys() == again.keys()
        for key, value in plain.items():
            torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_nothing_is_kept_between_calls(narrow_unet):
    student = Tapped(narrow_unet().train(), ["down_blocks.2.attentions.1.proj_out"])
    student.unet.enable_gradient_checkpointing()
    predicted, (feature,) = student(*_inputs())
    (predicted.mean() + feature.mean()).backward()  # runs the region again
    assert student._kept is None
    with pytest.raises(RuntimeError):
        student(torch.zeros(1, 5, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 12))
    assert student._kept is None
