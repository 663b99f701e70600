"""Seeded random weights at a true architecture: for tests and benchmarks without a download."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm.architecture import Architecture

# Half-width of a uniform distribution with the standard deviation 0.02 of CLIP's embeddings.
_EMBEDDING_BOUND = 0.02 * math.sqrt(3.0)


def build(architecture: Architecture, seed: int) -> tuple[CLIPTextModel, UNet2DConditionModel, AutoencoderKL]:
    """Text encoder, U-Net and VAE in eval mode, float32, on the CPU; the same seed gives the same weights.

    Every tensor has a generator of its own (seed, tensor name), so the weights depend neither on torch's version nor
    on the order in which a library registers its modules.
    """
    # include_buffers=False: CLIP's position ids are a buffer outside the state dict and must stay real.
    with init_empty_weights(include_buffers=False):
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
        unet = UNet2DConditionModel(**architecture.unet)
        vae = AutoencoderKL(**architecture.vae)
    for name, model in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        fill(model, seed, name)
    return text_encoder.eval(), unet.eval(), vae.eval()


def fill(model: nn.Module, seed: int, name: str) -> None:
    """Replace every parameter of `model` (which may live on "meta") by seeded values in torch's default ranges.

    Linear and convolution: uniform within 1 / sqrt(fan in), as torch.nn.Linear.reset_parameters does; norms: one and
    zero; embeddings: standard deviation 0.02.
    """
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for parameter_name, parameter in own.items():
            # transformers 5.6 flattened CLIPTextModel: the same tensor must get the same values in both layouts.
            key = f"{name}.{module_name}.{parameter_name}".replace(".text_model.", ".")
            values = _values(module, parameter_name, tuple(parameter.shape), seed, key)
            setattr(module, parameter_name, nn.Parameter(torch.from_numpy(values)))


def _values(module: nn.Module, parameter_name: str, shape: tuple[int, ...], seed: int, key: str) -> np.ndarray:
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return np.full(shape, 1.0 if parameter_name == "weight" else 0.0, dtype=np.float32)
    if isinstance(module, nn.Embedding):
        bound = _EMBEDDING_BOUND
    else:
        weight: torch.Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        bound = 1.0 / math.sqrt(math.prod(weight.shape[1:]))
    # numpy's fastest generator: SD v1.4's 1.07 G weights take 1.9 s of computing, less than the kernel's page faults.
    generator = np.random.Generator(np.random.SFC64([seed % 2**63, zlib.crc32(key.encode())]))
    values = generator.random(shape, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(2.0 * bound)
    return values
