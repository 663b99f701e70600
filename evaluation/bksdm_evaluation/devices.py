"""Where models and networks compute: their own device, or another one."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from bksdm.checkpoint import Checkpoint


def pick(name: str) -> torch.device:
    """A device by its name in torch; "auto": the GPU where there is one. Raises ValueError where it cannot be used.

    On a GPU torch computes in full float32 from here on, as on a CPU: TF32 keeps ten bits."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(kind)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"torch cannot use {name} ({str(error).splitlines()[0]}): take cpu") from error
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device


def of(network: nn.Module) -> torch.device:
    """Where a network's weights lie; the CPU for one without."""
    weight = next(chain(network.parameters(), network.buffers()), None)
    return torch.device("cpu") if weight is None else weight.device


def move(model: Checkpoint, device: torch.device) -> None:
    """Bring the whole model to a device."""
    for module in (model.unet, model.text_encoder, model.vae):
        nn.Module.to(module, device)  # nn.Module's own: diffusers' hides its annotations
