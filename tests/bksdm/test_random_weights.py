"""Seeded random weights: true architecture, the same for the same seed, and a network that stays in range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm import checkpoint, random_weights
from bksdm.architecture import SD_V1_4, SD_V2_1
from bksdm.checkpoint import Checkpoint


def test_the_same_seed_gives_the_same_weights_and_another_others(build_mini: Callable[..., Checkpoint]) -> None:
    first, again, other = build_mini(seed=1), build_mini(seed=1), build_mini(seed=2)
    for key, tensor in first.unet.state_dict().items():
        assert torch.equal(tensor, again.unet.state_dict()[key])
    assert not torch.equal(first.unet.conv_in.weight, other.unet.conv_in.weight)


def test_no_two_tensors_are_alike(mini_checkpoint: Checkpoint) -> None:
    seen = {}
    for key, tensor in mini_checkpoint.unet.state_dict().items():
        if tensor.dim() > 1:
            start = tuple(tensor.flatten()[:8].tolist())
            assert start not in seen, (key, seen.get(start))
            seen[start] = key


def test_weights_lie_in_torchs_own_ranges() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Conv2d(16, 32, 3), torch.nn.GroupNorm(4, 32))
    random_weights.fill(model, 0, "x")
    linear, convolution, norm = model
    for module, fan_in in ((linear, 64), (convolution, 144)):
        bound = fan_in**-0.5
        assert module.weight.abs().max() <= bound
        assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.025)  # measured: 0.6 % and 0.8 %
        assert module.bias.abs().max() <= bound
    assert torch.equal(norm.weight, torch.ones(32))
    assert torch.equal(norm.bias, torch.zeros(32))


def test_clips_position_ids_are_real() -> None:
    # Building on the meta device leaves buffers outside the state dict as garbage.
    config = {**SD_V1_4.text_encoder, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config |= {"intermediate_size": 32, "vocab_size": 100}
    model = CLIPTextModel(CLIPTextConfig(**config))
    built, _, _ = random_weights.build(
        SD_V1_4.__class__(
            unet={**SD_V1_4.unet, "block_out_channels": [32] * 4},
            text_encoder=config,
            vae={**SD_V1_4.vae, "block_out_channels": [32] * 4},
            scheduler=SD_V1_4.scheduler,
        ),
        0,
    )
    for (name, found), (_, expected) in zip(built.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_activations_stay_in_range(mini_checkpoint: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        out = mini_checkpoint.unet(noise, torch.tensor([500.0]), torch.randn(1, 77, 32, generator=generator)).sample
        pixels = mini_checkpoint.vae.decode(noise).sample
    for tensor in (out, pixels):
        assert 0.01 < tensor.std() < 10


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sd-v1.4", "v2-tiny"])
def test_full_size_random_checkpoint(variant: str) -> None:
    from bksdm.variants import VARIANTS

    whole = checkpoint.load("random", variant=variant, seed=3)
    assert sum(parameter.numel() for parameter in whole.unet.parameters()) == VARIANTS[variant].unet_params
    text = sum(parameter.numel() for parameter in whole.text_encoder.parameters())
    assert text == (123_060_480 if variant == "sd-v1.4" else 340_387_840)
    decoder = [*whole.vae.decoder.parameters(), *whole.vae.post_quant_conv.parameters()]
    assert sum(parameter.numel() for parameter in decoder) == 49_490_199
    assert whole.source == f"random({variant}, seed=3)"
    assert whole.licence.name == "none (random weights)"
    assert (whole.variant, whole.image_size) == (variant, 512)
    padded = whole.tokenizer("a", padding="max_length", max_length=77).input_ids
    assert padded[-1] == (49407 if variant == "sd-v1.4" else 0)


def test_sd21_predicts_velocity_at_768() -> None:
    assert SD_V2_1.scheduler["prediction_type"] == "v_prediction"
    assert SD_V2_1.unet["sample_size"] == 96
    assert SD_V2_1.unet["upcast_attention"] is True
