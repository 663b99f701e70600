"""Self-attention over many tokens at a fraction of its products: keys and values come from every n-th token alone.

Token downsampling, arXiv 2402.13573 (ToDo): all tokens ask, and those of a grid answer. Where a U-Net works at the full
size of the latents, neighbours are nearly the same; its attention costs 1 / n**2 there. Not exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel


class _DownsampledAttention:
    """diffusers' own attention, with keys and values from every n-th token in both directions."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.size: tuple[int, int] | None = None  # height and width of the tokens, told before each call
        self._attend = AttnProcessor2_0()

    def __call__(self, attention: Attention, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        if others.get("encoder_hidden_states") is not None or self.size is None:
            raise ValueError("token downsampling is of self-attention in a Transformer2DModel")
        grid = hidden_states.unflatten(1, self.size)  # [B, h, w, C]
        answering = grid[:, :: self.factor, :: self.factor].flatten(1, 2)  # [B, ceil(h/n) * ceil(w/n), C]
        return self._attend(attention, hidden_states, **{**others, "encoder_hidden_states": answering})  # [B, h*w, C]


def downsample_tokens(unet: UNet2DConditionModel, factor: int) -> int:
    """Have the self-attentions of the outermost down and up stage attend to every `factor`-th token, in place.

    Returns how many there are: 0 where those stages have none, whose U-Net is as it was.
    """
    found = 0
    for transformer in _outermost(unet):
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(_DownsampledAttention(factor))
            found += 1
        transformer.register_forward_pre_hook(_tell_size, with_kwargs=True)
    return found


def _outermost(unet: UNet2DConditionModel) -> Iterator[Any]:
    for stage in (unet.down_blocks[0], unet.up_blocks[-1]):
        for module in getattr(stage, "attentions", ()):
            if isinstance(module, Transformer2DModel):
                yield module


def _tell_size(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A hook that finds its processors by its module, so that both may be copied."""
    hidden_states = args[0] if args else kwargs["hidden_states"]  # [B, C, h, w]
    for block in transformer.transformer_blocks:
        block.attn1.processor.size = hidden_states.shape[-2:]
