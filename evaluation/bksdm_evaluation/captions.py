"""Captions to draw, each with its picture's name: COCO's annotations, BK-SDM's metadata.csv, JSON lines, or text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

COUNT, DRAW_SEED = 30_000, 0  # of the published protocol; the seed is ours, theirs is not known


class CaptionsError(Exception):
    """A file of captions that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Caption:
    """name: of its picture, without folder and suffix, unique among its captions."""

    name: str
    text: str


@dataclass(frozen=True)
class Captions:
    """rows: in the order of the file, or of the draw. sha256: of the file; draw_seed: None where all was taken."""

    rows: tuple[Caption, ...]
    file: str
    sha256: str
    draw_seed: int | None = None

    def by_name(self) -> Mapping[str, str]:
        return {row.name: row.text for row in self.rows}

    def identity(self) -> dict[str, object]:
        """Which captions these are, for JSON."""
        return {"file": self.file, "sha256": self.sha256, "count": len(self.rows), "draw_seed": self.draw_seed}


def read_captions(path: Path, count: int | None = None, draw_seed: int = DRAW_SEED) -> Captions:
    """The captions of a file, by its suffix: .json (COCO's captions_val2014.json), .csv, .jsonl, .txt.

    COCO has five captions or so of each picture, of which the seed chooses one. count: draw so many pictures of all,
    None for every one. The draw ranks names by a hash: the same on every machine, and that of a larger count begins
    with that of a smaller one. Raises CaptionsError.
    """
    readers: Mapping[str, Callable[[str, int], Iterator[Caption]]] = {
        ".json": _coco,
        ".csv": _csv,
        ".jsonl": _lines_of_json,
        ".txt": _lines,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CaptionsError(f"{path} is no file of captions that is known: give one of {', '.join(readers)}")
    try:
        content = path.read_bytes()
        rows = list(reader(content.decode("utf-8-sig"), draw_seed))
    except OSError as error:
        raise CaptionsError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start:,} is 0x{error.object[error.start]:02x}"
        raise CaptionsError(f"{path} is not UTF-8 text: {wrong}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, csv.Error) as error:
        raise CaptionsError(f"{path} is not {_LAYOUTS[path.suffix.lower()]}: {_why(error)}") from None
    if not rows:
        raise CaptionsError(f"{path} holds no caption")
    if twice := [name for name, times in Counter(row.name for row in rows).items() if times > 1]:
        raise CaptionsError(f"{path} names {len(twice):,} pictures more than once ({', '.join(twice[:3])}, ...)")
    if count is not None:
        if count > len(rows):
            raise CaptionsError(f"{path} has {len(rows):,} captions of pictures, and {count:,} are wanted")
        rows = sorted(rows, key=lambda row: _rank(draw_seed, row.name))[:count]
    drawn = count is not None or path.suffix.lower() == ".json"
    return Captions(tuple(rows), path.name, hashlib.sha256(content).hexdigest(), draw_seed if drawn else None)


_LAYOUTS = {
    ".json": "COCO's captions (an object with images and annotations)",
    ".csv": "a table with a header, of file names and texts",
    ".jsonl": 'lines of {"file_name": ..., "text": ...}',
    ".txt": "a caption a line",
}


def _rank(seed: int, name: object) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _coco(text: str, seed: int) -> Iterator[Caption]:
    """One caption of every picture that has any, in the order of their ids."""
    content = cast("dict[str, Any]", json.loads(text))
    names = {image["id"]: _stem(image["file_name"]) for image in content["images"]}
    captions: dict[int, list[tuple[int, str]]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append((annotation["id"], _checked(annotation["caption"])))
    for image, found in sorted(captions.items()):
        _, chosen = min(found, key=lambda one: _rank(seed, one[0]))
        yield Caption(names[image], chosen.strip())


def _csv(text: str, _seed: int) -> Iterator[Caption]:
    """Columns file_name and text, or, under other names, the first two: BK-SDM's own reader skips the header."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(rows, [])
    named = {"file_name", "text"} <= set(header)
    name, caption = (header.index("file_name"), header.index("text")) if named else (0, 1)
    for row in rows:
        if row:
            yield Caption(_stem(row[name]), _checked(row[caption]))


def _lines_of_json(text: str, _seed: int) -> Iterator[Caption]:
    for line in _written(text):
        row = json.loads(line)
        yield Caption(_stem(row["file_name"]), _checked(row["text"]))


def _lines(text: str, _seed: int) -> Iterator[Caption]:
    """Named by their place among the captions, from 000000."""
    for number, line in enumerate(_written(text)):
        yield Caption(f"{number:06d}", line)


def _written(text: str) -> Iterable[str]:
    return (line.strip() for line in text.split("\n") if line.strip())


def _stem(file_name: object) -> str:
    """A picture's name without folder and suffix. Raises ValueError on what no file can be called."""
    stem = Path(_checked(file_name)).stem
    if not stem or stem.startswith(".") or not stem.isprintable():
        raise ValueError(f"{str(file_name)[:60]!r} is no name of a picture")
    return stem


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{str(text)[:60]!r} is no text")
    return text


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, IndexError):
        return "a row has fewer columns than its header"
    return str(error)[:200]
