"""Small data sets of every layout: twelve flat colours with their numbers as captions."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

COUNT = 12


def encode(colour: int, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """A flat picture whose red is `colour`."""
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of named contents."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pairs(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """KEY.png and KEY.txt of each number."""
    return [part for n in numbers for part in ((f"{n:04}.png", encode(n)), (f"{n:04}.txt", f"number {n}\n".encode()))]


def make_jsonl(folder: Path) -> Path:
    rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(COUNT)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _images(folder)


def make_csv(folder: Path) -> Path:
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{n}.png", f"number {n}") for n in range(COUNT))])
    return _images(folder)


def make_tars(folder: Path) -> Path:
    for shard, numbers in enumerate((range(5), range(5, 9), range(9, COUNT))):
        write_tar(folder / f"{shard:05}.tar", pairs(numbers))
    return folder


def make_parquet(folder: Path) -> Path:
    rows = [{"image": {"bytes": encode(n), "path": f"{n}.png"}, "text": f"number {n}"} for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows[:7]), folder / "train-00000.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(rows[7:]), folder / "train-00001.parquet", row_group_size=4)
    return folder


def _images(folder: Path) -> Path:
    for n in range(COUNT):
        (folder / f"{n}.png").write_bytes(encode(n))
    return folder


LAYOUTS: Mapping[str, Callable[[Path], Path]] = {
    "jsonl": make_jsonl,
    "csv": make_csv,
    "tar": make_tars,
    "parquet": make_parquet,
}


@pytest.fixture
def make() -> Mapping[str, Callable[[Path], Path]]:
    """Layout -> what writes a data set of twelve so into an empty folder."""
    return LAYOUTS


@pytest.fixture(params=LAYOUTS)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data set of twelve, in every layout."""
    (folder := tmp_path / "numbers").mkdir()
    return LAYOUTS[request.param](folder)


@pytest.fixture(name="encode")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture(name="write_tar")
def _write_tar() -> Callable[..., Path]:
    return write_tar


@pytest.fixture(name="pairs")
def _pairs() -> Callable[[Sequence[int]], list[tuple[str, bytes]]]:
    return pairs
