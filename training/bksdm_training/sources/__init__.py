"""Pictures with captions, read one at a time: an image folder, tar shards, parquet files."""

from __future__ import annotations

from pathlib import Path

from bksdm_training.data import DataError
from bksdm_training.sources.folder import LISTINGS, open_folder
from bksdm_training.sources.order import ShardOrder
from bksdm_training.sources.picture import prepare
from bksdm_training.sources.plain import open_plain
from bksdm_training.sources.skips import BrokenExample, Skip, Skips, read_or_next
from bksdm_training.sources.source import Example, Source
from bksdm_training.sources.tar import COMPRESSED, open_tars

__all__ = [
    "BrokenExample",
    "Example",
    "ShardOrder",
    "Skip",
    "Skips",
    "Source",
    "open_plain",
    "open_source",
    "prepare",
    "read_or_next",
]

LAYOUTS = "a metadata.jsonl or metadata.csv beside its images, tar shards, or parquet files"


def open_source(path: Path, *, index: Path | None = None) -> Source:
    """Open the data set at `path`, by what is there: a folder, or a single listing, tar or parquet file of one.

    index: a file where the index of tar shards is kept from one opening to the next: two million pairs take minutes.
    Nothing is ever written beside the data.
    Tars come before parquet: img2dataset puts a parquet of mere metadata beside every tar.
    Raises DataError, and ModuleNotFoundError with what to install."""
    if path.is_file():
        return _open_file(path, index)
    if not path.is_dir():
        raise DataError(f"there is no data at {path}: give a folder with {LAYOUTS}")
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    listings = [name for name in LISTINGS if name in names]
    if len(listings) > 1:
        raise DataError(f"{path} has both {' and '.join(listings)}: give the path of the one to read")
    if listings:
        return open_folder(path / listings[0])
    if tars := [path / name for name in names if name.endswith((".tar", *COMPRESSED))]:
        return open_tars(path, tars, index)
    if files := [path / name for name in names if name.endswith(".parquet")]:
        return _open_parquet(path, files)
    inside = [name for name in names if (path / name).is_dir()]
    hint = f"; it holds the folder{'s' * (len(inside) > 1)} {', '.join(inside[:5])}" if inside else ""
    raise DataError(f"{path} is no data set that is known here{hint}: give a folder with {LAYOUTS}")


def _open_file(path: Path, index: Path | None) -> Source:
    if path.name in LISTINGS:
        return open_folder(path)
    if path.name.endswith((".tar", *COMPRESSED)):
        return open_tars(path, [path], index)
    if path.suffix == ".parquet":
        return _open_parquet(path, [path])
    raise DataError(f"{path} is no listing, tar or parquet file: give a folder with {LAYOUTS}")


def _open_parquet(path: Path, files: list[Path]) -> Source:
    try:
        from bksdm_training.sources.parquet import open_parquet  # pyarrow is only needed here
    except ModuleNotFoundError as error:
        message = f"{path} holds parquet files, which need {error.name}: pip install 'bksdm[training]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return open_parquet(path, files)
