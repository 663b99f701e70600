"""A checkpoint: the whole text-to-image model in torch, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from bksdm import diffusers_folder, vocabulary
from bksdm.errors import CheckpointError
from bksdm.licence import Licence

__all__ = ["Checkpoint", "CheckpointError", "Licence", "demo_folder", "save", "tokenizer"]


@dataclass(frozen=True)
class Checkpoint:
    """The whole model, in eval mode, float32, on the CPU.

    variant: the name of a row of bksdm.variants, or "custom" (another width, for instance the demo).
    source: "nota-ai/bk-sdm-small@<revision>", a path, "demo", or "random(small, seed=0)".
    image_size: default height and width in pixels.
    """

    variant: str
    source: str
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, object]
    licence: Licence
    image_size: int


def save(checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a full diffusers checkpoint (safetensors only, tokenizer in all its forms, licence) as `folder`.

    Written beside `folder` and renamed when whole, so that a kill at any moment leaves no half checkpoint. An existing
    checkpoint is replaced; a folder that holds anything else is refused. dtype: of the stored weights, None keeps them.
    Raises CheckpointError.
    """
    diffusers_folder.save(checkpoint, folder, dtype=dtype)


def demo_folder() -> Path:
    """<repository>/checkpoints/demo. Raises CheckpointError where there is none (an installed wheel)."""
    folder = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
    if not (folder / diffusers_folder.INDEX).is_file():
        raise CheckpointError(
            "the demo checkpoint ships with the repository, not with the wheel: clone the repository, "
            "or name other weights (a folder, a .safetensors file, or random)"
        )
    return folder


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer, 49,408 tokens, from the vocabulary in this package; SD 2 pads with "!"."""
    return vocabulary.clip(pad_token)
