"""An image folder: a listing of file names and captions, and the images beside it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bksdm_training.data import DataError
from bksdm_training.sources import picture
from bksdm_training.sources.skips import BrokenExample, Skips
from bksdm_training.sources.source import (
    CAPTION_NAMES,
    Example,
    captions_of,
    check_index,
    leaves_folder,
    licence_of,
    name_of,
)

LISTINGS = ("metadata.jsonl", "metadata.csv")
BOM = b"\xef\xbb\xbf"  # UTF-8's, which spreadsheets write


@dataclass(frozen=True, eq=False)
class FolderSource:
    """A Source. Only the places of its rows are held, 16 bytes each; a row is read again with its image.

    listing: its path. columns: the names in a csv's first line, empty for jsonl. rows: [N, 2] int64, where each begins
    and ends in the listing. repeats: rows whose image an earlier one names already. digest: SHA-256 of the listing."""

    listing: Path
    columns: tuple[str, ...]
    rows: NDArray[np.int64]
    repeats: frozenset[int]
    digest: str
    licence: str | None
    lost: Skips = field(default_factory=Skips)
    window: int = 1

    @property
    def name(self) -> str:
        """The folder's name."""
        return name_of(self.listing.parent)

    @property
    def shards(self) -> tuple[int, ...]:
        """All in one."""
        return (len(self),)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> str:
        """SHA-256 of the listing and of the images' sizes, -1 for a missing one; asks the disk for every image."""
        sizes = array("q")
        folder = str(self.listing.parent)
        with self.listing.open("rb") as file:
            for start, end in self.rows.tolist():
                file.seek(start)
                try:
                    sizes.append(os.stat(f"{folder}/{self._parse(file.read(end - start))['file_name']}").st_size)  # noqa: PTH116
                except (OSError, ValueError, KeyError, csv.Error):
                    sizes.append(-1)
        return hashlib.sha256(bytes.fromhex(self.digest) + sizes.tobytes()).hexdigest()

    def read(self, index: int) -> Example:
        """Raises BrokenExample, IndexError."""
        check_index(index, len(self))
        row = self._row(index)
        name = str(row["file_name"])
        key = f"{name}#{index}" if index in self.repeats else name
        captions = captions_of(key, row)
        try:
            content = (self.listing.parent / name).read_bytes()
        except FileNotFoundError:
            raise BrokenExample(key, "missing file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise BrokenExample(key, "unreadable file", reason or error) from None
        return Example(key, picture.decode(key, content), captions)

    def _row(self, index: int) -> dict[str, object]:
        start, end = self.rows[index].tolist()
        try:
            with self.listing.open("rb") as file:
                file.seek(start)
                row = self._parse(file.read(end - start))
            if not isinstance(row.get("file_name"), str) or leaves_folder(str(row["file_name"])):
                raise ValueError("no file name where one was")
        except (OSError, ValueError, csv.Error) as error:
            raise BrokenExample(f"row {index}", "listing changed since it was opened", error) from None
        return row

    def _parse(self, text: bytes) -> dict[str, object]:
        if not self.columns:
            row = json.loads(text)
            return row if isinstance(row, dict) else {}
        fields = next(csv.reader(io.StringIO(text.decode(), newline=""), strict=True), [])
        return {name: fields[i] for i, name in enumerate(self.columns[: len(fields)]) if name in ROW_NAMES}


ROW_NAMES = ("file_name", *CAPTION_NAMES)  # all that counts of a csv: "captions" would be a list spelt as a text


def open_folder(listing: Path) -> FolderSource:
    """Read a listing through once: `metadata.jsonl` with "file_name", "text" and maybe "captions" in each line, or
    `metadata.csv` with columns file_name and text, BK-SDM's own.

    A row without a caption, or without its image, is a broken example, to be skipped; a listing that is broken itself
    is refused, naming the line. Raises DataError."""
    starts, names = array("q"), array("Q")
    lines = _Lines(listing)
    try:
        with listing.open("rb") as file:
            columns, rows = lines.csv(file) if listing.suffix == ".csv" else ((), lines.jsonl(file))
            for start, end, name in rows:
                starts.extend((start, end))
                names.append(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
    except OSError as error:
        raise DataError(f"{listing} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{listing}, line {lines.number}: {error}: mend it or take the line out") from error
    if not names:
        raise DataError(f"{listing} is empty: it should name an image and its caption in each row")
    return FolderSource(
        listing,
        columns,
        np.array(starts, dtype=np.int64).reshape(-1, 2),
        _repeats(np.array(names, dtype=np.uint64)),
        lines.digest.hexdigest(),
        licence_of(listing.parent),
    )


class _Lines:
    """Goes through a listing, knowing where it is."""

    def __init__(self, listing: Path) -> None:
        self.listing = listing
        self.number = 0
        self.position = 0
        self.digest = hashlib.sha256()

    def jsonl(self, file: BinaryIO) -> Iterator[tuple[int, int, str]]:
        """(start, end, file name) of every row that is not blank."""
        for line in self._read(file):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError('a row must be an object with "file_name" and "text"')
                yield self.position - len(line), self.position, _name(row.get("file_name"))

    def csv(self, file: BinaryIO) -> tuple[tuple[str, ...], Iterator[tuple[int, int, str]]]:
        """The columns, and (start, end, file name) of every row that is not blank."""
        reader = csv.reader((line.decode() for line in self._read(file)), strict=True)
        columns = tuple(name.strip() for name in next(reader, []))
        if "file_name" not in columns or not set(columns) & set(CAPTION_NAMES):
            found = ", ".join(map(repr, columns)) or "nothing"
            raise ValueError(
                f"the first line must name the columns file_name and text, separated by commas; found {found}"
            )
        return columns, self._csv_rows(reader, columns)

    def _csv_rows(self, reader: Iterator[list[str]], columns: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
        place = columns.index("file_name")
        start = self.position
        for fields in reader:
            if fields:
                if len(fields) > len(columns):
                    raise ValueError(f"{len(fields)} values for {len(columns)} columns; quote texts that hold commas")
                yield start, self.position, _name(fields[place] if place < len(fields) else None)
            start = self.position  # the reader asks for no line beyond the row, quoted line ends included

    def _read(self, file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            self.number += 1
            self.position += len(line)
            self.digest.update(line)
            yield line.removeprefix(BOM) if self.number == 1 else line


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a row has no file_name")
    if leaves_folder(value):
        raise ValueError(f"file_name {value!r} leaves the folder")
    return value


def _repeats(names: NDArray[np.uint64]) -> frozenset[int]:
    order = np.argsort(names, kind="stable")
    same = names[order][1:] == names[order][:-1]
    return frozenset(order[1:][same].tolist())
