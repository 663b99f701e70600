"""What every data source gives: examples by number, in shards, with an identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from bksdm_training.data import DataError
from bksdm_training.sources.skips import BrokenExample, Skips

CAPTION_NAMES = ("text", "caption")  # of a column, a field or an attribute; the first that is there counts
LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")


@dataclass(frozen=True)
class Example:
    """key: a name unique in its source. image: RGB, upright. captions: none is empty, the canonical one first."""

    key: str
    image: Image.Image
    captions: tuple[str, ...]


class Source(Protocol):
    """Examples 0 to len-1, read one at a time. Picklable, so DataLoader workers may read; one thread at a time."""

    @property
    def name(self) -> str:
        """The folder's name, for records: never an absolute path."""
        ...

    @property
    def shards(self) -> tuple[int, ...]:
        """Examples of each shard, in order: a tar, a row group of a parquet file; a folder is one shard."""
        ...

    @property
    def window(self) -> int:
        """How many shards may be mixed without reading any of them twice: what ShardOrder's window should be."""
        ...

    @property
    def identity(self) -> str:
        """SHA-256 that tells this data set from others by names, sizes and listings, not by every pixel.

        Worked out at every call: a folder asks the disk for each of its images."""
        ...

    @property
    def licence(self) -> str | None:
        """Text of the LICENSE beside the data."""
        ...

    @property
    def lost(self) -> Skips:
        """What was found unusable at opening and has no number: the cut end of a tar, say."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example:
        """Raises BrokenExample when this one cannot be used, IndexError past the end."""
        ...


def captions_of(key: str, row: Mapping[str, object]) -> tuple[str, ...]:
    """The texts of a row: its "text" (or "caption"), then those of its "captions"; each a text or a list of texts.

    White space around them goes, and so do repetitions. Raises BrokenExample when nothing is left."""
    canonical = next((row[name] for name in CAPTION_NAMES if row.get(name) is not None), None)
    texts: dict[str, None] = {}  # a set that keeps the order
    found = False
    for value in (canonical, row.get("captions")):
        for text in value if isinstance(value, list | tuple) else (value,):
            if text is None:
                continue
            if not isinstance(text, str):
                raise BrokenExample(key, "undecodable caption", f"{type(text).__name__} instead of a text")
            if not text.isascii():
                _check_unicode(key, text)
            found = True
            texts[text.strip()] = None
    texts.pop("", None)
    if not texts:
        raise BrokenExample(key, "empty caption" if found else "missing caption")
    return tuple(texts)


def licence_of(folder: Path) -> str | None:
    """Text of the LICENSE in a data set's folder; a split of `bksdm-train data` has it one folder up.

    Raises DataError when it cannot be read."""
    places = [folder, folder.parent] if (folder.parent / "dataset.json").is_file() else [folder]
    for path in (place / name for place in places for name in LICENCE_NAMES):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read as text ({error}): save it as UTF-8") from error
    return None


def name_of(path: Path) -> str:
    """The last part of a path, that of the working folder for "."."""
    return path.resolve().name


def check_index(index: int, count: int) -> None:
    """Raise IndexError outside 0 to count-1: a negative number would silently count from the end."""
    if not 0 <= index < count:
        raise IndexError(f"example {index} of {count}")


def leaves_folder(name: str) -> bool:
    """Whether a name read from data points outside the place it is relative to."""
    return name.startswith("/") or ".." in name.split("/")


def _check_unicode(key: str, text: str) -> None:
    try:
        text.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise BrokenExample(key, "undecodable caption", error) from None
