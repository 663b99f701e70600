"""Flat modules say what the models say, and tracing at any size leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from bksdm.checkpoint import Checkpoint
from bksdm_export.wrappers import any_size, wrap


@torch.no_grad()
def test_flat_modules_equal_the_models_own_calls(mini_checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 49_408, (2, 77), dtype=torch.int32)
    context = wrap(mini_checkpoint, "text_encoder")(ids)
    assert torch.equal(context, mini_checkpoint.text_encoder(ids).last_hidden_state)

    latents = torch.randn(2, 4, 8, 8)
    eps = wrap(mini_checkpoint, "unet")(latents, torch.tensor([981.0]), context)
    assert torch.equal(eps, mini_checkpoint.unet(latents, 981.0, context).sample)

    image = wrap(mini_checkpoint, "vae_decoder")(latents)
    assert torch.equal(image, mini_checkpoint.vae.decode(latents).sample)

    parameters = wrap(mini_checkpoint, "vae_encoder")(image)
    assert torch.equal(parameters, mini_checkpoint.vae.encode(image).latent_dist.parameters)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (9, 13), (7, 4), (1, 1)], ids=str)
def test_any_size_changes_no_result(mini_checkpoint: Checkpoint, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    unet = wrap(mini_checkpoint, "unet")
    decoder = wrap(mini_checkpoint, "vae_decoder")
    inputs = torch.randn(2, 4, *size), torch.tensor([501.0, 1.0]), torch.randn(2, 77, 32)
    expected = unet(*inputs), decoder(inputs[0])
    with any_size(unet), any_size(decoder):
        found = unet(*inputs), decoder(inputs[0])
    # Not bit for bit: torch may choose another convolution for another layout of the same tensor.
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)  # measured: 0


def test_any_size_is_undone_even_after_an_error(build_smallest: Callable[..., Checkpoint]) -> None:
    unet = wrap(build_smallest(), "unet")
    before = [(module, dict(vars(module))) for module in unet.modules()]
    with pytest.raises(KeyError), any_size(unet):
        raise KeyError
    for module, attributes in before:
        assert dict(vars(module)) == attributes


def test_an_upsampler_of_another_kind_is_refused(build_smallest: Callable[..., Checkpoint]) -> None:
    unet = wrap(build_smallest(), "unet")
    upsampler = next(module for module in unet.modules() if isinstance(module, Upsample2D))
    upsampler.use_conv_transpose = True
    with pytest.raises(ValueError, match="not Stable Diffusion's"), any_size(unet):
        pass


def test_an_unknown_component_is_refused(mini_checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="'safety_checker'"):
        wrap(mini_checkpoint, "safety_checker")
