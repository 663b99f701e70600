"""CLIP score: the mean cosine between a picture and its caption, as BK-SDM's scores have it (not times 100).

The published network is open_clip's ViT-g-14 on laion2b_s34b_b88k, whose weights transformers opens as a CLIPModel.
open_clip itself needs torchvision; its preprocessing is written out here, and a test holds it to another writing of it.
A score of another network is not comparable with the published ones, and a result names its network.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from bksdm_evaluation import devices
from bksdm_evaluation.errors import ClipError

PUBLISHED = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
# open_clip's OPENAI_DATASET_MEAN and _STD, which it trained these weights with, too.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


class Clip:
    """A CLIP model and its tokenizer, in eval mode. name: where it came from."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, name: str) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._side = int(model.config.vision_config.image_size)
        self.name = name

    @classmethod
    def load(cls, name: str, device: torch.device) -> Clip:
        """A folder or a name on the Hub. Raises ClipError."""
        try:
            model = CLIPModel.from_pretrained(name)
            tokenizer = CLIPTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ClipError(f"the CLIP network {name} cannot be loaded ({reason:.200}): give its folder") from error
        torch.nn.Module.to(model, device)
        return cls(model, tokenizer, name if not Path(name).exists() else Path(name).resolve().name)

    def prepare(self, picture: Image.Image) -> NDArray[np.float32]:
        """A picture -> [3, side, side], as open_clip's image_transform: the shorter side to the network's size by the
        bicubic filter, the middle of it, normalised."""
        width, height = picture.size
        shorter = min(width, height)
        # torchvision's Resize cuts off the fraction of the longer side; its CenterCrop rounds half to even.
        width, height = (
            self._side if length == shorter else int(self._side * length / shorter) for length in (width, height)
        )
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self._side) / 2.0), round((height - self._side) / 2.0)
        middle = resized.crop((left, top, left + self._side, top + self._side)).convert("RGB")
        pixels = np.asarray(middle, np.float32) / np.float32(255)
        return np.moveaxis((pixels - _MEAN) / _STD, 2, 0).astype(np.float32)

    @torch.no_grad()
    def cosines(self, pictures: Sequence[NDArray[np.float32]], captions: Sequence[str]) -> NDArray[np.float64]:
        """Of each prepared picture and its caption, [B]."""
        device = devices.of(self._model)
        seen = self._of_pictures(torch.from_numpy(np.stack(pictures)).to(device))
        read = self._of_texts(captions, device)
        return (F.normalize(seen) * F.normalize(read)).sum(1).double().cpu().numpy()

    # Not CLIPModel.get_image_features: what that returns differs between transformers 4 and 5.
    def _of_pictures(self, pixels: Tensor) -> Tensor:
        model: Any = self._model
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)  # [B, D]

    def _of_texts(self, captions: Sequence[str], device: torch.device) -> Tensor:
        ids = self._tokenizer([cleaned(caption) for caption in captions], padding="max_length", truncation=True)
        model: Any = self._model
        tokens = torch.tensor(ids["input_ids"], device=device)  # [B, 77]
        # No mask: attention is causal, and what stands after the end of text reaches nothing before it.
        return model.text_projection(model.text_model(input_ids=tokens).pooler_output)  # [B, D]


def cleaned(text: str) -> str:
    """A caption as open_clip cleans it before its tokenizer, which ftfy does there for quotes."""
    return " ".join(html.unescape(html.unescape(text.translate(_STRAIGHT))).split())
