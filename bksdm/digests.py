"""Whether two models have the same weights: SHA-256 of tensors, of modules and of whole checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from bksdm.checkpoint import Checkpoint


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights as float32, in the order of their names."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        total.update(tensors[key].detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def of_parts(whole: Checkpoint) -> dict[str, str]:
    """SHA-256 of the weights of each part."""
    parts = {"text_encoder": whole.text_encoder, "unet": whole.unet, "vae": whole.vae}
    return {name: digest(part.state_dict()) for name, part in parts.items()}
