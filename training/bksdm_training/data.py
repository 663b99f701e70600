"""Pictures and captions of an image folder, held in memory: what the demo teacher trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from bksdm.sampling import token_ids


class DataError(Exception):
    """The image folder cannot be read as one."""


@dataclass(frozen=True)
class Pictures:
    """pixels: [N, 3, size, size] uint8. captions: N lists, the canonical one first. names: N file names."""

    pixels: Tensor
    captions: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def read_folder(folder: Path, size: int) -> Pictures:
    """Read `folder/metadata.jsonl` and its pictures, resized to `size` px square.

    A line holds "file_name" and "text", and may hold "captions" (all the texts training draws from).
    Raises DataError naming the file and line."""
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise DataError(f"{folder} has no metadata.jsonl: make one with bksdm-train data -o DIR")
    pixels, captions, names = [], [], []
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing} cannot be read as text ({error}): make the folder again") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, texts = row["file_name"], row.get("captions") or [row["text"]]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("captions must be a list of texts")
            with Image.open(folder / name) as picture:
                image = picture.convert("RGB")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DataError(f"{listing}, line {number}: {type(error).__name__}: {error}") from error
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        captions.append(tuple(texts))
        names.append(name)
    if not names:
        raise DataError(f"{listing} is empty")
    return Pictures(torch.stack(pixels), tuple(captions), tuple(names))


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Order:
    """Which pictures a step sees: every epoch is a permutation of its own, seeded, so any step can be looked up."""

    count: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> Tensor:
        """Indices [batch_size] of step 1, 2, ...; the last batch of an epoch runs on into the next one."""
        first = (step - 1) * self.batch_size
        wanted = range(first, first + self.batch_size)
        epochs = {position // self.count for position in wanted}
        orders = {epoch: torch.randperm(self.count, generator=seeded(self.seed, epoch)) for epoch in epochs}
        return torch.stack([orders[position // self.count][position % self.count] for position in wanted])


def seeded(seed: int, index: int) -> torch.Generator:
    """A CPU generator of its own for (seed, index): resuming needs no saved random state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


@dataclass(frozen=True)
class TokenTable:
    """Token ids of every caption of every picture. ids: [T, 77] int64; starts[i]: first row of picture i."""

    ids: Tensor
    starts: Tensor
    counts: Tensor
    empty: Tensor

    def draw(self, pictures: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        """One caption per picture at random, replaced by the empty one with probability `dropout`: [B, 77]."""
        pick = torch.rand(len(pictures), generator=generator)
        rows = self.starts[pictures] + (pick * self.counts[pictures]).long()
        ids = self.ids[rows]
        dropped = torch.rand(len(pictures), generator=generator) < dropout
        return torch.where(dropped[:, None], self.empty, ids)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> TokenTable:
    """Tokenize all captions once."""
    flat = [text for texts in captions for text in texts]
    counts = torch.tensor([len(texts) for texts in captions])
    return TokenTable(token_ids(tokenizer, flat), counts.cumsum(0) - counts, counts, token_ids(tokenizer, [""])[0])
