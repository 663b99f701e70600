"""Pictures of many captions as files to score: sharded, restartable, each the same whatever is drawn beside it.

A folder of them is an image folder: a picture file for each caption, `metadata.jsonl` with all captions of the job, and
`generation.json`, which says how they were drawn. Shards may write to one folder or to many: scores take several, and
their pictures are told apart by name alone. Nothing that is finished is drawn again, and no file is half written.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from bksdm_evaluation.artists import Artist, Settings
from bksdm_evaluation.captions import Captions
from bksdm_evaluation.protocol import SCORED_SIZE, Protocol
from bksdm_evaluation.shards import Shard

GENERATION, LISTING = "generation.json", "metadata.jsonl"


class GenerationError(Exception):
    """Pictures that cannot be generated, or not into this folder; the message is one sentence."""


@dataclass(frozen=True)
class Job:
    """What is drawn, in all shards together. seed: of all noise, see protocol; size: of the files, pixels square."""

    captions: Captions
    settings: Settings
    protocol: Protocol
    seed: int
    size: int = SCORED_SIZE

    def identity(self, artist: Artist) -> dict[str, object]:
        """What decides the pictures, for JSON; the batch size does not, but for the last bit of some backends."""
        return {
            "captions": self.captions.identity(),
            "model": artist.identity(),
            "protocol": self.protocol.name,
            "seed": self.seed,
            "size": self.size,
            "steps": self.settings.steps,
            "guidance_scale": self.settings.guidance_scale,
            "sampler": self.settings.sampler,
        }


@dataclass(frozen=True)
class Generated:
    """made: pictures of this run; found: those of its shard that were there; missing: of other shards, still."""

    made: int
    found: int
    missing: int


def pending(job: Job, shard: Shard, folder: Path) -> list[int]:
    """The numbers of the shard's captions whose pictures are not there."""
    return [i for i in shard.of(len(job.captions.rows)) if not _place(job, i, folder).exists()]


def generate(
    artist: Artist,
    job: Job,
    folder: Path,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    *,
    full: Path | None = None,
    on_step: Callable[[float], object] = lambda share: None,
) -> Generated:
    """Draw what is missing of a shard's pictures. Killed and called again it goes on.

    full: a folder for the pictures at the model's own size, as PNG. on_step: told what share of a picture was made.
    Raises GenerationError where the folder holds pictures that were drawn otherwise; OSError; what the artist raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if full is not None:
        full.mkdir(parents=True, exist_ok=True)
    _claim(folder, job, artist)
    waiting = pending(job, shard, folder)
    _clear_parts(folder, {job.captions.rows[i].name for i in waiting})
    noise = job.protocol.noise(job.seed, artist.latent_shape)
    rows, batch = job.captions.rows, job.settings.batch_size
    for start in range(0, len(waiting), batch):
        these = waiting[start : start + batch]
        texts = [rows[i].text for i in these]
        drawn = artist.draw(texts, [noise(i, _key(rows[i].name, rows[i].text)) for i in these], job.settings, on_step)
        for i, pixels in zip(these, drawn, strict=True):
            if full is not None:
                write_whole(full / f"{rows[i].name}.png", job.protocol.lossless(pixels))
            write_whole(_place(job, i, folder), job.protocol.file_of(pixels, job.size))
    everything = sum(1 for i in range(len(rows)) if _place(job, i, folder).exists())
    return Generated(len(waiting), len(shard.of(len(rows))) - len(waiting), len(rows) - everything)


def differences(one: Mapping[str, object], other: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """In words, what differs between two identities: "steps is 20 there, 25 here"."""
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} is {str(a)[:40]} there, {str(b)[:40]} here"


def _key(name: str, text: str) -> str:
    return f"{name}:{text}"


def _place(job: Job, number: int, folder: Path) -> Path:
    return folder / f"{job.captions.rows[number].name}{job.protocol.suffix}"


def _claim(folder: Path, job: Job, artist: Artist) -> None:
    """Say how the folder's pictures are drawn, or find it said. Of many processes at once, one says it."""
    identity = json.loads(json.dumps(job.identity(artist)))
    place = folder / GENERATION
    if not place.exists():
        lines = [
            json.dumps({"file_name": f"{row.name}{job.protocol.suffix}", "text": row.text}, ensure_ascii=False)
            for row in job.captions.rows
        ]
        write_whole(folder / LISTING, ("\n".join(lines) + "\n").encode())
        _write_once(place, (json.dumps(identity, indent=2) + "\n").encode())
    try:
        found = json.loads(place.read_text("utf-8"))
    except ValueError as error:
        raise GenerationError(f"{place} cannot be read ({error}): remove the folder, or take another") from None
    if others := list(differences(found, identity)):
        raise GenerationError(
            f"{folder} holds pictures that were drawn otherwise ({'; '.join(others[:4])}): take another folder"
        )


def _clear_parts(folder: Path, names: Set[str]) -> None:
    """Remove what a killed process left of these pictures, which are nobody else's."""
    for part in folder.glob(".*.part"):
        if part.name.removeprefix(".").partition(".")[0] in names:
            part.unlink(missing_ok=True)


def write_whole(place: Path, content: bytes) -> None:
    """A file, whole or not at all, also where a folder is shared between machines."""
    temporary = place.with_name(f".{place.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _write_once(place: Path, content: bytes) -> None:
    """The same, unless it is there."""
    temporary = place.with_name(f".{place.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, place)
        except FileExistsError:
            pass
        except OSError:  # a file system without links: the moment between look and write is left open
            if not place.exists():
                temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
