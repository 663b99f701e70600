"""Which files are scored, and those that cannot be: counted and named."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_evaluation.picture_files import PicturesError, Reader, collect, refuse_missing


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)
    return path


def test_shards_merge_by_name_where_their_bytes_agree(tmp_path: Path) -> None:
    for folder, names in (("a", "12"), ("b", "23")):
        for name in names:
            picture(tmp_path / folder / f"{name}.png", int(name))
    (tmp_path / "a" / ".1.png.host-7.part").write_bytes(b"")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "generation.json").write_text("{}")
    found = collect([tmp_path / "b", tmp_path / "a"])
    assert list(found) == ["1", "2", "3"]
    picture(tmp_path / "b" / "2.png", 77)
    with pytest.raises(PicturesError, match=r"1 name of two pictures: .*a/2.png and .*b/2.png"):
        collect([tmp_path / "a", tmp_path / "b"])


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "a" / "1.jpg")
    with pytest.raises(PicturesError, match=r"1 name of two pictures: .*1.jpg and .*1.png"):
        collect([tmp_path / "a"])


def test_an_empty_folder_and_none_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PicturesError, match="there is no picture in"):
        collect([tmp_path])
    with pytest.raises(PicturesError, match="cannot be read: No such file"):
        collect([tmp_path / "gone"])


def test_pictures_come_in_order_and_broken_ones_are_counted(tmp_path: Path) -> None:
    files = {f"{i:02d}": picture(tmp_path / f"{i:02d}.png", i) for i in range(40)}
    whole = files["07"].read_bytes()
    files["07"].write_bytes(whole[: len(whole) // 2])
    files["11"].write_bytes(b"no picture")
    files["13"].unlink()
    seen = threading.local()

    def prepare(_name: str, one: Image.Image) -> int:
        seen.any = True
        return int(np.asarray(one)[0, 0, 0])

    reader = Reader(files, prepare, threads=4, ahead=8)
    read = dict(reader)
    assert list(read) == [name for name in files if name not in ("07", "11", "13")]
    assert all(value == int(name) for name, value in read.items())
    assert not hasattr(seen, "any")  # in threads, not here
    with pytest.raises(
        PicturesError, match=r"3 pictures cannot be scored: 07: .*, 11: cannot identify .*, 13: .*No such"
    ):
        reader.refuse_broken()


def test_reading_ends_where_the_reader_is_left(tmp_path: Path) -> None:
    files = {str(i): picture(tmp_path / f"{i}.png") for i in range(200)}
    count = 0

    def prepare(_name: str, one: Image.Image) -> None:
        nonlocal count
        count += 1

    for _ in Reader(files, prepare, threads=2, ahead=4):
        break
    assert count < 20


def test_captions_without_a_picture_are_counted_and_named(tmp_path: Path) -> None:
    files = {"a": tmp_path}
    refuse_missing(["a"], files, "caption")
    with pytest.raises(PicturesError, match=r"4 captions without a picture: b, c, d, \.\.\."):
        refuse_missing(list("abcde"), files, "caption")
