"""Parquet files with the images inside, in the layout of Hugging Face's `datasets`."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bksdm_training.data import DataError
from bksdm_training.sources import picture
from bksdm_training.sources.skips import BrokenExample, Skips
from bksdm_training.sources.source import CAPTION_NAMES, Example, captions_of, check_index, licence_of, name_of

IMAGE = "image"  # the column, a struct of bytes and path, or the bytes themselves
KEPT = 256 * 2**20  # bytes of row groups held by a process: five of 100 images of 0.5 MB
WINDOW = 8  # row groups mixed at most


@dataclass(frozen=True)
class RowGroup:
    """file: its number. group: its number within. rows and size: how many, and bytes of the columns read."""

    file: int
    group: int
    rows: int
    size: int


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """A Source. Parquet has no way to a single row, so row groups are read whole, the last few kept.

    columns: what is read. groups: the shards. footers: SHA-256 of each file's footer, where its layout is written."""

    files: tuple[Path, ...]
    name: str
    columns: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    footers: tuple[str, ...]
    licence: str | None
    lost: Skips = field(default_factory=Skips)
    _kept: OrderedDict[int, pa.Table] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": OrderedDict()}  # each process reads its own

    @property
    def shards(self) -> tuple[int, ...]:
        """One a row group."""
        return tuple(group.rows for group in self.groups)

    @property
    def window(self) -> int:
        """As many row groups as are kept at a time."""
        return min(WINDOW, max(1, KEPT // max(1, *(group.size for group in self.groups))))

    @cached_property
    def _starts(self):
        counts = np.array(self.shards, dtype=np.int64)
        return counts.cumsum() - counts

    def __len__(self) -> int:
        return int(self._starts[-1]) + self.groups[-1].rows

    @property
    def identity(self) -> str:
        """SHA-256 of the files' names, sizes and footers."""
        about = [
            [file.name, file.stat().st_size, footer] for file, footer in zip(self.files, self.footers, strict=True)
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def read(self, index: int) -> Example:
        """Raises BrokenExample, IndexError."""
        check_index(index, len(self))
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[number])
        group = self.groups[number]
        key = f"{self.files[group.file].name}/{group.group}/{row}"
        try:
            values = {name: self._table(number)[name][row].as_py() for name in self._names}
        except UnicodeDecodeError as error:  # parquet does not hold its texts to UTF-8
            raise BrokenExample(key, "undecodable caption", error) from None
        except (OSError, pa.ArrowException) as error:
            raise BrokenExample(key, "unreadable row group", error) from None
        captions = captions_of(key, values)
        image = values[IMAGE]
        content = image.get("bytes") if isinstance(image, dict) else image
        if content is None:
            raise BrokenExample(key, "missing file", "the image is not embedded")
        return Example(key, picture.decode(key, content), captions)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(name.split(".")[0] for name in self.columns)

    def _table(self, number: int) -> pa.Table:
        table = self._kept.pop(number, None)
        if table is None:
            group = self.groups[number]
            while self._kept and sum(self.groups[other].size for other in self._kept) + group.size > KEPT:
                self._kept.popitem(last=False)
            with pq.ParquetFile(self.files[group.file]) as file:
                # one thread: a worker forked from a process with Arrow's threads has none of them
                table = file.read_row_group(group.group, columns=list(self.columns), use_threads=False)
        self._kept[number] = table
        return table


def open_parquet(path: Path, files: list[Path]) -> ParquetSource:
    """Open parquet files as one source, reading their footers.

    Needs a column "image" and one of text, caption (a text or a list of them); a list "captions" adds to it.
    path: what was asked for, a folder or the file itself. Raises DataError."""
    columns: tuple[str, ...] = ()
    groups: list[RowGroup] = []
    footers: list[str] = []
    for number, path_of_file in enumerate(files):
        try:
            with pq.ParquetFile(path_of_file) as file:
                found = _columns(path_of_file, file.schema_arrow)
                groups += _groups(number, file.metadata, found)
            footers.append(_footer(path_of_file))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path_of_file} cannot be read as parquet ({_first_line(error)}): fetch it again"
            ) from error
        if columns and found != columns:
            raise DataError(f"{path_of_file} has other columns than {files[0].name}: keep them in folders of their own")
        columns = found
    if not groups:
        raise DataError(f"{path} holds no row in {len(files)} parquet file{'s' * (len(files) > 1)}")
    return ParquetSource(
        tuple(files), name_of(path), columns, tuple(groups), tuple(footers), licence_of(files[0].parent)
    )


def _columns(path: Path, schema: pa.Schema) -> tuple[str, ...]:
    """What to read of a file: of a struct the bytes alone."""
    kinds = {name: schema.field(name).type for name in schema.names}
    caption = next((name for name in CAPTION_NAMES if name in kinds and _is_text(kinds[name])), None)
    image = kinds.get(IMAGE)
    if image is not None and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        column = f"{IMAGE}.bytes"
    elif image is not None and _is_binary(image):
        column = IMAGE
    else:
        column = None
    if caption is None or column is None:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError(
            f"{path} needs a column image with the images' bytes, and one of {', '.join(CAPTION_NAMES)} with texts; "
            f"it has {listed or 'none'}: rename them, or embed the images"
        )
    more = ("captions",) if "captions" in kinds and _is_text(kinds["captions"]) else ()
    return (column, caption, *more)


def _groups(file: int, metadata: pq.FileMetaData, columns: tuple[str, ...]) -> Iterator[RowGroup]:
    names = {name.split(".")[0] for name in columns}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)
        if group.num_rows:
            yield RowGroup(file, number, group.num_rows, size)


def _footer(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")  # then the magic
        file.seek(-8 - length, 2)
        return hashlib.sha256(file.read(length)).hexdigest()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
