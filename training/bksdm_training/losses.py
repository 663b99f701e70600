"""What a student is trained on: task, output and feature distillation (BK-SDM, arXiv 2305.15798, equations 1 to 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Factor of each part of the loss; the published run weighs all alike.

    snr_gamma: weigh task and output of each example by min(SNR + 1, gamma) / SNR of its timestep; None, as published,
    weighs all timesteps alike."""

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if min(self.task, self.output, self.feature) < 0 or not self.task + self.output:
            raise ValueError(
                "loss weights are 0 or more, and task or output more than 0: features alone predict nothing"
            )

        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma is more than 0, not {self.snr_gamma}")

    @property
    def teacher_needed(self) -> bool:
        """Whether anything is compared with the teacher."""
        return self.output > 0 or self.feature > 0


def distillation_terms(
    predicted: Tensor,
    target: Tensor,
    features: Sequence[Tensor],
    teacher_predicted: Tensor | None,
    teacher_features: Sequence[Tensor],
    weights: LossWeights,
    example_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of the loss, each a scalar in float32: "task", "output", and "feature_<i>" per tap.

    predicted, target, teacher_predicted: [B, 4, h, w]; target is the noise, or the velocity where the teacher predicts
    that. features, teacher_features: pairs of equal shapes. Means are over all elements. example_weights: [B], of task
    and output. A term of weight 0 is left out; teacher_predicted is None where no term needs it."""
    terms: dict[str, Tensor] = {}
    if weights.task:
        terms["task"] = weights.task * _mse(predicted, target, example_weights)
    if weights.output and teacher_predicted is not None:
        terms["output"] = weights.output * _mse(predicted, teacher_predicted, example_weights)
    if weights.feature:
        for index, (ours, theirs) in enumerate(zip(features, teacher_features, strict=True)):
            terms[f"feature_{index}"] = weights.feature * _mse(ours, theirs)
    return terms


def _mse(a: Tensor, b: Tensor, example_weights: Tensor | None = None) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.float() - b.detach().float()).square()
    if example_weights is None:
        return error.mean()
    return (error.flatten(1).mean(1) * example_weights).mean()
