"""A U-Net as two graphs, so that a sampler may run only its outermost layer on most steps (arXiv 2312.00858)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel

# What of a U-Net stands before its first stage and after its last.
_ENDS = ("time_proj", "time_embedding", "conv_in", "conv_norm_out", "conv_act", "conv_out")


class UNetWithFeatures(torch.nn.Module):
    """The U-Net that gives besides what its outermost layer takes from the others (see ShallowUNet)."""

    output = "out_sample"

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        _before_last(model)
        self.model = model

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, _args: object, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hook = _before_last(self.model).register_forward_hook(keep)
        try:
            out = self.model(sample, timestep.expand(sample.shape[0]), encoder_hidden_states, return_dict=False)[0]
        finally:
            hook.remove()
        return out, found[0]  # [B, 4, h, w], [B, F, h, w]


def _before_last(unet: UNet2DConditionModel) -> torch.nn.Module:
    """The layer before the last of the outermost up stage. Raises ValueError where the stage has only one."""
    stage: Any = unet.up_blocks[-1]
    layers = getattr(stage, "attentions", None) or stage.resnets
    if len(layers) < 2:
        raise ValueError("the outermost up stage has a single layer: there is nothing that a step cache could keep")
    return layers[-2]


class ShallowUNet(torch.nn.Module):
    """The first convolution, the last layer of the outermost up stage and the output: the U-Net from deep features on.

    What DeepCache (arXiv 2312.00858) runs on most steps at its outermost branch. On the features that the whole U-Net
    gives for the same inputs, it gives the same output. A copy of the weights, which whoever exports may turn.
    """

    output = "out_sample"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        _before_last(unet)
        stage: Any = unet.up_blocks[-1]
        number = str(len(unet.up_blocks) - 1)
        layer = str(len(stage.resnets) - 1)
        last = {
            kind: torch.nn.ModuleDict({layer: getattr(stage, kind)[-1]})
            for kind in ("resnets", "attentions")
            if getattr(stage, kind, None)
        }
        # Under the U-Net's own names, so that nodes and weights are called as in the whole graph.
        up_blocks = torch.nn.ModuleDict({number: torch.nn.ModuleDict(last)})
        ends = {name: getattr(unet, name) for name in _ENDS}
        self.model = copy.deepcopy(torch.nn.ModuleDict({**ends, "up_blocks": up_blocks}))
        self._last = {kind: self.model.get_submodule(f"up_blocks.{number}.{kind}.{layer}") for kind in last}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        deep_features: torch.Tensor,
    ) -> torch.Tensor:
        phases = self.model["time_proj"](timestep.expand(sample.shape[0])).to(sample.dtype)  # always float32
        embedding = self.model["time_embedding"](phases)
        skipped = self.model["conv_in"](sample)  # [B, F, h, w], the outermost skip connection
        hidden = self._last["resnets"](torch.cat([deep_features, skipped], dim=1), embedding)
        if "attentions" in self._last:
            hidden = self._last["attentions"](hidden, encoder_hidden_states, return_dict=False)[0]
        hidden = self.model["conv_act"](self.model["conv_norm_out"](hidden))
        return self.model["conv_out"](hidden)  # [B, 4, h, w]
