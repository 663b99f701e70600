"""A tiny image folder and tiny settings: the whole of the teacher's training in seconds."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from bksdm_training import vae
from bksdm_training.config import LoopConfig, TeacherConfig
from bksdm_training.teacher import train_teacher

MINI = TeacherConfig(
    size=64,
    crop=32,
    unet_channels=(16, 16, 16, 16),
    unet_heads=2,
    unet_groups=8,
    text_width=16,
    text_layers=1,
    text_heads=2,
    vae_channels=(8, 8, 8, 8),
    vae_groups=4,
    vae=LoopConfig(steps=6, batch_size=4, learning_rate=1e-3, warmup=2, checkpoint_every=2),
    unet=LoopConfig(steps=6, batch_size=4, learning_rate=1e-3, warmup=2, checkpoint_every=2),
)


@pytest.fixture
def mini_config() -> TeacherConfig:
    return replace(MINI)


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve flat discs with their colours as captions, in two splits."""
    root = tmp_path_factory.mktemp("data") / "discs"
    y, x = np.mgrid[:64, :64]
    disc = ((y - 32) ** 2 + (x - 32) ** 2 < 24**2)[..., None]
    for split, count in (("train", 12), ("unseen", 3)):
        (root / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            colour = np.array(colorsys.hsv_to_rgb(i / count, 1, 0.9)) * 255
            Image.fromarray(np.where(disc, colour, 255).astype(np.uint8)).save(root / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"disc {i}", "captions": [f"disc {i}", f"{i}"]}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (root / "dataset.json").write_text("{}")
    (root / "LICENSE").write_text("Discs: public domain.\n")
    return root


class SquaredError(nn.Module):
    """Stands where LPIPS stands: its weights come from a package registry, which quick tests do not ask."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


@pytest.fixture
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "Lpips", SquaredError)


@pytest.fixture(scope="session")
def trained(mini_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in float32; copy it before anything goes on from it."""
    folder = tmp_path_factory.mktemp("trained")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "Lpips", SquaredError)
        train_teacher(MINI, mini_data, folder, torch.device("cpu"), dtype=torch.float32)
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def narrow_unet() -> Callable[..., UNet2DConditionModel]:
    """Stable Diffusion's stage pattern at 16 channels, the same weights at every call."""

    def build(*, v2: bool = False) -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16, 16, 16),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=v2,
        )

    return build


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state per process: a test that asks for another precision or device would be refused."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
