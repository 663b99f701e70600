"""How pictures come to the scoring networks, and from which noise they were drawn: scores depend on it, too.

`published`  BK-SDM's own: a picture is saved as JPEG (Pillow's default quality), resized by Pillow's bicubic filter,
             saved as JPEG again; Inception's input is resized as pytorch-fid 0.3.0 does it, bilinear. One generator,
             a GPU's, runs through all captions, so that picture i is its i-th draw.
`clean`      no JPEG: resized by the same filter, which averages where it shrinks, and kept as PNG; Inception's input is
             resized by that filter too, without rounding between (arXiv 2104.11222). Noise belongs to its caption.

Both bring real pictures to the same size in the same way. Scores of two protocols cannot be compared.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bksdm_runtime.noise import open_generator, randn

SCORED_SIZE = 256  # pixels, of zero-shot MS-COCO 256x256
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Protocol:
    """name: one of PROTOCOLS, named in every result. suffix: of its files; seed: unless another is asked for."""

    name: str
    suffix: str
    seed: int

    @property
    def is_published(self) -> bool:
        return self.suffix == ".jpg"

    def file_of(self, pixels: NDArray[np.uint8], size: int) -> bytes:
        """A generated picture [H, W, 3] as the file that is scored, `size` pixels square."""
        picture = Image.fromarray(pixels)
        if self.is_published:
            picture = Image.open(io.BytesIO(_encoded(picture, "JPEG")))
        return _encoded(_resized(picture, size), "JPEG" if self.is_published else "PNG")

    def lossless(self, pixels: NDArray[np.uint8]) -> bytes:
        """A picture [H, W, 3] as PNG, at its own size."""
        return _encoded(Image.fromarray(pixels), "PNG")

    def real(self, picture: Image.Image, size: int) -> Image.Image:
        """A real picture as it is scored. A generated one's file is of that size, and is taken as it is."""
        if picture.mode not in ("L", "RGB"):  # of COCO there are no others
            picture = picture.convert("RGB")
        picture = _resized(picture, size)
        if self.is_published:
            picture = Image.open(io.BytesIO(_encoded(picture, "JPEG")))
        return picture.convert("RGB")

    def noise(self, seed: int, shape: tuple[int, ...]) -> Callable[[int, str], NDArray[np.float32]]:
        """noise(i, caption): what picture i is drawn from, of `shape` [C, h, w]. i must rise from call to call.

        published: number i of one CUDA generator's draws, on any machine (see bksdm_runtime.noise)."""
        if not self.is_published:
            return lambda _number, caption: randn(_seed_of(seed, caption), shape)
        generator = open_generator(seed, "cuda")
        drawn = -1

        def draw(number: int, _caption: str) -> NDArray[np.float32]:
            nonlocal drawn
            if number <= drawn:
                raise ValueError(f"draw {number} of a generator that is at {drawn}")
            while True:
                noise = generator.randn((1, *shape))[0]
                drawn += 1
                if drawn == number:
                    return noise

        return draw


PUBLISHED = Protocol("published", ".jpg", 1234)
CLEAN = Protocol("clean", ".png", 0)
PROTOCOLS = {protocol.name: protocol for protocol in (CLEAN, PUBLISHED)}


def _seed_of(seed: int, caption: str) -> int:
    """64 bits that depend on the caption alone: not on its place, its batch, its shard or a restart."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{caption}".encode()).digest()[:8], "big")


def _resized(picture: Image.Image, size: int) -> Image.Image:
    return picture if picture.size == (size, size) else picture.resize((size, size), _BICUBIC)


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()
