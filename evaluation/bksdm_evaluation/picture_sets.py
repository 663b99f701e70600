"""Sets of pictures: real ones, or generated ones with what their folders say of how they were drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bksdm_evaluation.captions import read_captions
from bksdm_evaluation.generation import GENERATION, LISTING, differences
from bksdm_evaluation.picture_files import PicturesError, collect, refuse_missing
from bksdm_evaluation.protocol import CLEAN, PROTOCOLS, Protocol
from bksdm_evaluation.scoring import Source
from bksdm_evaluation.shards import Shard


@dataclass(frozen=True)
class PictureSet:
    """files: by name, sorted. real: of any size. generation: what their folders say of how they were drawn, if they do;
    listing: the file of all their captions beside them, if there is one."""

    files: Mapping[str, Path]
    protocol: Protocol
    size: int
    real: bool = False
    generation: Mapping[str, Any] | None = None
    listing: Path | None = None

    @property
    def source(self) -> Source[Any]:
        return Source(self.files, self.protocol, self.size, self.real)

    def part(self, shard: Shard) -> PictureSet:
        """A shard of its pictures. Raises PicturesError where that is none."""
        names = list(self.files)
        chosen = {names[i]: self.files[names[i]] for i in shard.of(len(names))}
        if not chosen:
            raise PicturesError(f"shard {shard.index}/{shard.count} of {len(names)} pictures is empty")
        return replace(self, files=chosen)

    def refuse_missing(self, captions: Mapping[str, str]) -> None:
        """Raises PicturesError where a caption has no picture."""
        refuse_missing(list(captions), self.files, "caption")


def real(folders: Sequence[Path], protocol: Protocol, size: int) -> PictureSet:
    """Raises PicturesError."""
    return PictureSet(collect(folders), protocol, size, real=True)


def generated(folders: Sequence[Path], protocol: str | None, size: int) -> PictureSet:
    """Shards of one job. protocol: by name, None for what the folders say, or clean where they say nothing.

    Raises PicturesError: also where folders were drawn differently, or under another protocol or at another size.
    """
    said = {folder: _said(folder) for folder in folders if (folder / GENERATION).exists()}
    first = next(iter(said), None)
    generation = None if first is None else said[first]
    for folder, other in said.items():
        if generation is not None and (apart := list(differences(generation, other))):
            raise PicturesError(f"{first} and {folder} are not shards of one job: {'; '.join(apart[:3])}")
    if generation is not None:
        for what, wanted in (("protocol", protocol), ("size", size)):
            if wanted not in (None, generation[what]):
                raise PicturesError(f"{first} was drawn with {what} {generation[what]}, not {wanted}")
        protocol = generation["protocol"]
    listings = [folder / LISTING for folder in folders if (folder / LISTING).exists()]
    return PictureSet(
        collect(folders),
        CLEAN if protocol is None else PROTOCOLS[protocol],
        size,
        generation=generation,
        listing=listings[0] if listings else None,
    )


def captions_of(pictures: PictureSet, file: Path | None) -> Mapping[str, str]:
    """Captions by the names of their pictures: of a file, else of the listing beside them, else none.

    Raises CaptionsError."""
    chosen = file or pictures.listing
    return {} if chosen is None else read_captions(chosen).by_name()


def _said(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / GENERATION).read_text("utf-8"))
        if found["protocol"] not in PROTOCOLS or not isinstance(found["size"], int):
            raise ValueError("its protocol or size is unknown")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PicturesError(f"{folder / GENERATION} cannot be read: {error}") from None
    return found
