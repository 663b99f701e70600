"""Stand-ins for the packaged networks, whose weights come from a registry: quick tests do not ask one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bksdm_evaluation import features, inception, student


class Colours(nn.Module):
    """Mean colours of a coarse grid, through a fixed random projection: [B, 3, H, W] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        projection = torch.randn(48, width, generator=torch.Generator().manual_seed(0)) / 48**0.5
        self.register_buffer("projection", projection)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.projection


class SquaredError(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "WIDTH", 64)  # covariances of 2048 features take seconds each
    monkeypatch.setattr(inception, "load_network", lambda: Colours(64))
    monkeypatch.setattr(features, "load_network", lambda: Colours(1280))
    monkeypatch.setattr(student, "Lpips", SquaredError)
