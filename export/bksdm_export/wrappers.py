"""Torch modules with flat tensor signatures: arguments and results are those of `graphs`, in its order and names."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from transformers import CLIPTextModel

from bksdm_export.step_cache import ShallowUNet, UNetWithFeatures

if TYPE_CHECKING:
    from bksdm.checkpoint import Checkpoint

WRAPPED = "model."  # prefix of every key below a wrapper; without it keys are those of the checkpoint


class TextEncoder(torch.nn.Module):
    output = "last_hidden_state"

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, return_dict=False)[0]  # [B, 77, D]


class UNet(torch.nn.Module):
    output = "out_sample"

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        # [B] from [B] or [1]. Written out, so that the batch below comes from `sample` alone.
        timestep = timestep.expand(sample.shape[0])
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]  # [B, 4, h, w]


class VaeDecoder(torch.nn.Module):
    """AutoencoderKL.decode without its tiling and slicing."""

    output = "sample"

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = model.post_quant_conv or torch.nn.Identity()
        self.decoder = model.decoder

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latent_sample))  # [B, 3, 8h, 8w]


class VaeEncoder(torch.nn.Module):
    """AutoencoderKL.encode up to its distribution, which is the caller's to draw from."""

    output = "latent_parameters"

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv or torch.nn.Identity()

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(sample))  # [B, 8, h, w]


Wrapper = TextEncoder | UNet | UNetWithFeatures | ShallowUNet | VaeDecoder | VaeEncoder


def wrap(checkpoint: Checkpoint, component: str, *, features: bool = False) -> Wrapper:
    """The flat module of one component, in eval mode; it shares its weights with the checkpoint, unet_shallow excepted.

    features: the U-Net gives its deep features too. Raises ValueError where it has none to give.
    """
    match component:
        case "text_encoder":
            wrapper = TextEncoder(checkpoint.text_encoder)
        case "unet":
            wrapper = UNetWithFeatures(checkpoint.unet) if features else UNet(checkpoint.unet)
        case "unet_shallow":
            wrapper = ShallowUNet(checkpoint.unet)
        case "vae_decoder":
            wrapper = VaeDecoder(checkpoint.vae)
        case "vae_encoder":
            wrapper = VaeEncoder(checkpoint.vae)
        case _:
            raise ValueError(f"no component is called {component!r}")
    return wrapper.eval()


# Larger than any latent size, so that no size is a multiple of 2 ** this.
_NO_GRID = 30


@contextmanager
def any_size(wrapper: torch.nn.Module) -> Iterator[None]:
    """While it lasts, tracing the wrapper gives one graph that is right at every size and batch.

    diffusers' U-Net upsamples by two where the latents are multiples of 2 ** upsamplers, and to the size of the skip
    connection elsewhere. A trace keeps one of the two ways; the second is right at every size, and the same at
    multiples, so it is the one that is traced. Upsample2D besides compares batch and size with limits that only its
    choice of memory layout depends on, which tracing would turn into limits of the graph.
    """
    upsamplers = [module for module in wrapper.modules() if isinstance(module, Upsample2D)]
    unets = [module for module in wrapper.modules() if isinstance(module, UNet2DConditionModel)]
    counts = [unet.num_upsamplers for unet in unets]
    for unet in unets:
        unet.num_upsamplers = _NO_GRID
    for module in upsamplers:
        if module.norm is not None or module.use_conv_transpose or not module.interpolate or module.name != "conv":
            raise ValueError("this model's Upsample2D is not Stable Diffusion's nearest neighbour and convolution")
        vars(module)["forward"] = functools.partial(_upsample, module)  # found before the class's own
    try:
        yield
    finally:
        for module in upsamplers:
            del vars(module)["forward"]
        for unet, count in zip(unets, counts, strict=True):
            unet.num_upsamplers = count


def _upsample(
    module: Upsample2D, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None
) -> torch.Tensor:
    scale = 2.0 if output_size is None else None
    hidden_states = F.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest")
    return hidden_states if module.conv is None else module.conv(hidden_states)
