"""Caption retrieval: is the dataset picture nearest to a generated one the picture that its caption belongs to?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bksdm import image_folder


class DatasetError(Exception):
    """The dataset folder cannot be read."""


class ScoreError(Exception):
    """What was generated cannot be scored."""


@dataclass(frozen=True)
class Dataset:
    """Captioned pictures of one split, canonical captions first. sha256: of its listing and picture files."""

    captions: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    sha256: str

    def chosen(self, count: int) -> list[int]:
        """Indices of `count` captions, evenly spread over the split: the same every time."""
        return sorted({int(i) for i in np.linspace(0, len(self.captions) - 1, min(count, len(self.captions)))})


@dataclass(frozen=True)
class Retrieval:
    """ranks[i]: place (0 = nearest) of the caption's own picture among all of the dataset's."""

    ranks: NDArray[np.int64]

    def top(self, k: int) -> float:
        """Share of generated pictures whose own dataset picture is among the k nearest."""
        return float((self.ranks < k).mean())


def read_dataset(folder: Path, size: int) -> Dataset:
    """Read an image folder with metadata.jsonl; pictures are brought to `size` px, the generator's, first.

    Raises DatasetError."""
    listing = folder / "metadata.jsonl"
    try:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        pictures = []
        for row in rows:
            with Image.open(folder / row["file_name"]) as picture:
                pictures.append(picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
        if not rows:
            raise ValueError("it is empty")
        identity = image_folder.digest(folder, [row["file_name"] for row in rows])
        return Dataset(tuple(row["text"] for row in rows), tuple(pictures), identity)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else error
        raise DatasetError(f"{listing} cannot be read ({reason}): make one with bksdm-train data -o DIR") from error


def rank(generated: NDArray[np.float32], dataset: NDArray[np.float32], own: Sequence[int]) -> Retrieval:
    """Rank every dataset picture by cosine similarity to each generated one.

    generated: [G, D], dataset: [N, D], both of unit length; own[g]: the dataset row that g was generated for.
    A picture as near as its own counts against it, so that constant features score nothing. Raises ScoreError on
    features that are not finite."""
    if not (np.isfinite(generated).all() and np.isfinite(dataset).all()):
        raise ScoreError("features are not finite: no picture is near another")
    similarity = generated @ dataset.T  # [G, N]
    mine = similarity[np.arange(len(own)), list(own)]
    return Retrieval((similarity >= mine[:, None]).sum(1) - 1)
