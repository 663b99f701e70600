"""Feature taps: which outputs of teacher and student are compared, and a U-Net that returns them with its prediction.

BK-SDM (arXiv 2305.15798, section 3.2) compares the outputs of corresponding stages, on the way down and up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bksdm.unet import unet_config
from bksdm.variants import Removal


@dataclass(frozen=True)
class Tap:
    """One pair of modules whose outputs have the same shape, by their names in each U-Net."""

    teacher: str
    student: str


def taps(teacher_config: Mapping[str, Any], removal: Removal) -> tuple[Tap, ...]:
    """The published taps, derived from the removal rule: the output of every stage that the student has.

    The stage that became innermost lost its downsampler, so its output has another size than the teacher's: there the
    last attention's projection is compared (a stage without attention: the last residual block). The mid block is not
    tapped."""
    student = unet_config(teacher_config, removal)
    stages = len(student["down_block_types"])
    down = [Tap(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(stages)]
    up = [Tap(f"up_blocks.{i + removal.stages}", f"up_blocks.{i}") for i in range(stages)]
    if removal.stages:
        inside = "attentions.{}.proj_out" if "CrossAttn" in student["down_block_types"][-1] else "resnets.{}"
        last = (_layers(config, stages - 1) - 1 for config in (teacher_config, student))
        down[-1] = Tap(*(f"down_blocks.{stages - 1}.{inside.format(index)}" for index in last))
    return (*down, *up)


class Tapped(nn.Module):
    """A U-Net that returns (prediction, features): features are the outputs of the named modules, in that order.

    They are part of what forward returns and belong to that call alone, so that a wrapper around this module (data
    parallel, sharded, compiled) sees them as it sees the prediction. A checkpointed region runs a second time in the
    backward pass, outside forward: what its modules give then is not taken for a feature."""

    def __init__(self, unet: UNet2DConditionModel, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self._names = tuple(names)
        self._kept: dict[str, Tensor] | None = None
        for name in self._names:
            unet.get_submodule(name).register_forward_hook(self._keeper(name))

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """noisy [B, 4, h, w], timesteps [B], context [B, 77, D] -> prediction [B, 4, h, w], one tensor per tap."""
        self._kept = kept = {}
        try:
            predicted = self.unet(noisy, timesteps, context, return_dict=False)[0]
        finally:
            self._kept = None
        return predicted, tuple(kept[name] for name in self._names)

    def _keeper(self, name: str):
        def keep(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, Any]) -> None:
            if self._kept is not None:
                # a down stage also returns its skip connections
                self._kept[name] = output[0] if isinstance(output, tuple) else output

        return keep


def _layers(config: Mapping[str, Any], stage: int) -> int:
    layers = config.get("layers_per_block", 2)
    return cast(int, layers if isinstance(layers, int) else layers[stage])
