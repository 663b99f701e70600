"""From a position in the order of training to an example with everything that is random about it.

Positions 0, 1, 2, ... run on over epochs; step s of batch size B sees positions (s - 1) B to s B - 1. What is drawn for
a position (flip, caption, timestep, noise) follows from the seed and the position alone. So a run does not depend on
the number of processes, workers or accumulated parts, and goes on after a kill without replaying anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import CLIPTokenizer

from bksdm.sampling import token_ids
from bksdm_training.data import DataError, seeded
from bksdm_training.sources import ShardOrder, Skip, Source, prepare, read_or_next

TIMESTEPS = 1000


@dataclass(frozen=True)
class Drawing:
    """What is drawn for each position. latent: shape of the latents; flip: whether pictures may be mirrored."""

    seed: int
    latent: tuple[int, int, int]
    flip: bool
    caption_dropout: float

    def at(self, position: int) -> Draw:
        """Everything random about one position, always drawn in the same order."""
        generator = seeded(self.seed, position)
        flip, caption, dropout = torch.rand(3, generator=generator).tolist()
        return Draw(
            flip=self.flip and flip < 0.5,
            caption=caption,
            dropped=dropout < self.caption_dropout,
            timestep=torch.randint(TIMESTEPS, (), generator=generator),
            latent_noise=torch.randn(self.latent, generator=generator),
            noise=torch.randn(self.latent, generator=generator),
        )


@dataclass(frozen=True)
class Draw:
    """flip: mirror the picture; caption: [0, 1), which of its captions; dropped: the empty one instead."""

    flip: bool
    caption: float
    dropped: bool
    timestep: Tensor
    latent_noise: Tensor
    noise: Tensor

    def pick(self, captions: Sequence[str]) -> int:
        """Index of the caption."""
        return int(self.caption * len(captions))


@dataclass(frozen=True)
class Batch:
    """Examples on their way to the device: pictures and token ids, or what a cache holds instead of them.

    pixels: [B, 3, S, S] uint8 and ids: [B, 77]; or moments: [B, 8, h, w] (mean, standard deviation, unscaled) and
    context: [B, 77, D]. latent_noise, noise: [B, 4, h, w]; timesteps: [B]."""

    timesteps: Tensor
    latent_noise: Tensor
    noise: Tensor
    pixels: Tensor | None = None
    ids: Tensor | None = None
    moments: Tensor | None = None
    context: Tensor | None = None
    skipped: tuple[Skip, ...] = ()

    def pin_memory(self) -> Batch:
        """DataLoader calls it where there is a GPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


class Examples(Protocol):
    """Examples by position. identity: what tells one set from another; shards: examples a shard, of the source."""

    identity: str

    def __getitem__(self, position: int) -> Batch: ...
    def __len__(self) -> int: ...


class PictureExamples(Dataset[Batch]):
    """Examples read from their source as they are needed."""

    def __init__(
        self, source: Source, tokenizer: CLIPTokenizer, drawing: Drawing, *, size: int, seed: int, window: int
    ) -> None:
        self.source, self.tokenizer, self.drawing, self.size = source, tokenizer, drawing, size
        self.order = ShardOrder(source.shards, seed, window)
        self.identity = source.identity

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Batch:
        example, skipped = read_or_next(self.source, self.order.index(position))
        draw = self.drawing.at(position)
        caption = "" if draw.dropped else example.captions[draw.pick(example.captions)]
        return Batch(
            pixels=prepare(example.image, self.size, draw.flip)[None],
            ids=token_ids(self.tokenizer, [caption]),
            timesteps=draw.timestep[None],
            latent_noise=draw.latent_noise[None],
            noise=draw.noise[None],
            skipped=tuple(skipped),
        )


class PairedExamples(Dataset[Batch]):
    """Two sets in turn: even positions are of the first, odd ones of the second, so that every even batch, however it
    is dealt out, holds both in equal parts."""

    def __init__(self, first: Examples, second: Examples) -> None:
        self.sets = (first, second)
        self.identity = hashlib.sha256(f"{first.identity} {second.identity}".encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def __getitem__(self, position: int) -> Batch:
        return self.sets[position % 2][position // 2]


class Feed:
    """Batches of a run in order, this process's share of each: made ahead by worker processes."""

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        parts: int,
        process: int,
        processes: int,
        workers: int,
        pinned: bool = False,
    ):
        self.examples, self.workers, self.pinned = examples, workers, pinned
        self.batch_size, self.parts, self.process, self.processes = batch_size, parts, process, processes
        self._batches: Iterator[Batch] | None = None
        self._next = (0, 0)

    def batch(self, step: int, part: int) -> Batch:
        """This process's examples of a part of a step; steps and parts are asked for in their order."""
        if self._batches is None or self._next != (step, part):
            self._batches = self._from(step, part)
        self._next = (step, part + 1) if part + 1 < self.parts else (step + 1, 0)
        try:
            with torch.autocast("cpu", enabled=False):  # as in a worker; torch.cat refuses fp16 in bf16's autocast
                return next(self._batches)
        except DataError as error:
            raise without_traceback(error) from None

    def positions(self, step: int, part: int) -> range:
        """Positions of this process in a part of a step."""
        size = self.batch_size // (self.parts * self.processes)
        first = (step - 1) * self.batch_size + (part * self.processes + self.process) * size
        return range(first, first + size)

    def _from(self, step: int, part: int) -> Iterator[Batch]:
        loader: DataLoader[Batch] = DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=_Endless(self, step, part),
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # its own, so that workers' seeds do not draw from torch's
        )
        return iter(loader)


class _Endless(Sampler[list[int]]):
    def __init__(self, feed: Feed, step: int, part: int) -> None:
        self.feed, self.step, self.part = feed, step, part

    def __iter__(self) -> Iterator[list[int]]:
        step, part = self.step, self.part
        while True:
            yield list(self.feed.positions(step, part))
            step, part = (step, part + 1) if part + 1 < self.feed.parts else (step + 1, 0)


def without_traceback(error: DataError) -> DataError:
    """A worker's error as it was raised there: torch puts the whole traceback into its message."""
    said = str(error).rpartition("DataError: ")[2].strip()
    return DataError(said or str(error))


def collate(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""

    def joined(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)

    names = [f.name for f in fields(Batch) if f.name != "skipped"]
    skipped = tuple(skip for batch in batches for skip in batch.skipped)
    return Batch(**{name: joined(name) for name in names}, skipped=skipped)  # pyright: ignore[reportArgumentType]
