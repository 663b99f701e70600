"""The architectures of the teachers, as the configurations that diffusers and transformers read.

Sources: the published config files of CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1-base and
stabilityai/stable-diffusion-2-1. Students differ in the U-Net alone (see bksdm.unet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """Whole model: four configurations and the text that fills a prompt up to 77 tokens.

    pad_token: SD 1 pads with the end-of-text token, SD 2 with "!" (token 0).
    """

    unet: Config
    text_encoder: Config
    vae: Config
    scheduler: Config
    pad_token: str = "<|endoftext|>"


_UNET_V1: Config = MappingProxyType(
    {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' misnomer: the number of heads
        "use_linear_projection": False,
        "upcast_attention": False,
    }
)
_UNET_V2_BASE: Config = MappingProxyType(
    {**_UNET_V1, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
)

_CLIP_VIT_L: Config = MappingProxyType(
    {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,  # the published value: transformers then pools at the highest token id, the end of text
    }
)
# OpenCLIP ViT-H without its last layer: SD 2 is conditioned on the penultimate one.
_OPEN_CLIP_VIT_H: Config = MappingProxyType(
    {
        **_CLIP_VIT_L,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 512,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    }
)

_VAE: Config = MappingProxyType(
    {
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    }
)

_PNDM: Config = MappingProxyType(
    {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
)
_DDIM_V: Config = MappingProxyType(
    {
        **{key: value for key, value in _PNDM.items() if key != "skip_prk_steps"},
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
)

SD_V1_4 = Architecture(unet=_UNET_V1, text_encoder=_CLIP_VIT_L, vae=_VAE, scheduler=_PNDM)
SD_V2_1_BASE = Architecture(unet=_UNET_V2_BASE, text_encoder=_OPEN_CLIP_VIT_H, vae=_VAE, scheduler=_PNDM, pad_token="!")
SD_V2_1 = Architecture(
    unet=MappingProxyType({**_UNET_V2_BASE, "sample_size": 96, "upcast_attention": True}),
    text_encoder=_OPEN_CLIP_VIT_H,
    vae=MappingProxyType({**_VAE, "sample_size": 768}),
    scheduler=_DDIM_V,
    pad_token="!",
)
