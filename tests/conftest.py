"""Fixtures that every package's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bksdm.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def build_mini() -> Callable[..., Checkpoint]:
    """build(seed=0, unet={...}, text_encoder={...}, vae={...}, scheduler={...}): SD v1's stage pattern, 5.3 M weights.

    Widths 32/64/64/64, context 32, 8 heads, 8x8 latents of 64x64 pixels, the real 49,408-token vocabulary. Keyword
    arguments change single settings. Every norm is moved away from one and zero, so that a swapped norm is noticed.
    """
    import torch

    from bksdm import checkpoint, random_weights
    from bksdm.architecture import SD_V1_4, Architecture
    from bksdm.licence import RANDOM

    unet = {
        **SD_V1_4.unet,
        "sample_size": 8,
        "block_out_channels": [32, 64, 64, 64],
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    }
    text_encoder = {
        **SD_V1_4.text_encoder,
        "hidden_size": 32,
        "intermediate_size": 128,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vae = {**SD_V1_4.vae, "sample_size": 64, "block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8}

    def build(seed: int = 0, **changes: dict[str, Any]) -> Checkpoint:
        architecture = Architecture(
            unet={**unet, **changes.get("unet", {})},
            text_encoder={**text_encoder, **changes.get("text_encoder", {})},
            vae={**vae, **changes.get("vae", {})},
            scheduler={**SD_V1_4.scheduler, **changes.get("scheduler", {})},
        )
        models = random_weights.build(architecture, seed)
        generator = torch.Generator().manual_seed(seed)
        for model in models:
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data.add_(noise, alpha=0.1)
        return checkpoint.Checkpoint(
            variant="custom",
            source=f"mini(seed={seed})",
            text_encoder=models[0],
            unet=models[1],
            vae=models[2],
            tokenizer=checkpoint.tokenizer(),
            scheduler_config=dict(architecture.scheduler),
            licence=RANDOM,
            image_size=64,
        )

    return build


@pytest.fixture(scope="session")
def mini_checkpoint(build_mini: Callable[..., Checkpoint]) -> Checkpoint:
    """A whole model small enough for every test; shared by the session, so never change it in place."""
    return build_mini()
