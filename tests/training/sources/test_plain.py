"""A plain folder of one subject."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from bksdm_training.data import DataError
from bksdm_training.sources import open_plain, read_or_next


@pytest.fixture
def folder(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    folder = tmp_path / "dog"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "sub/c.png", "._a.JPG"):
        (folder / name).write_bytes(encode(7))
    (folder / "metadata.jsonl").write_text("no listing")
    return folder


def test_every_picture_has_the_prompt(folder: Path) -> None:
    source = open_plain(folder, " sks dog ")
    assert (source.name, source.names, source.shards) == ("dog", ("a.JPG", "b.png"), (2,))
    assert [source.read(index).captions for index in range(2)] == [("sks dog",)] * 2
    assert pickle.loads(pickle.dumps(source)).read(1).image.getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(IndexError, match="of 2"):
        source.read(2)


def test_another_prompt_or_picture_is_another_set(folder: Path, encode: Callable[..., bytes]) -> None:
    one = open_plain(folder, "sks dog")
    assert open_plain(folder, "sks cat").identity != one.identity
    before = one.identity
    (folder / "b.png").write_bytes(encode(7, size=(80, 80)))
    assert one.identity != before


def test_a_broken_picture_is_skipped(folder: Path) -> None:
    (folder / "a.JPG").write_bytes(b"cut")
    example, skips = read_or_next(open_plain(folder, "sks dog"), 0)
    assert example.key == "b.png"
    assert [skip.key for skip in skips] == ["a.JPG"]
    source = open_plain(folder, "sks dog")
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match="cannot be used"):
        read_or_next(source, 0)


def test_the_licence_beside_them_is_read(folder: Path) -> None:
    assert open_plain(folder, "x").licence is None
    (folder / "LICENSE").write_text("Mine.\n")
    assert open_plain(folder, "x").licence == "Mine.\n"


@pytest.mark.parametrize(
    ("name", "prompt", "said"),
    [("dog", " ", "need a prompt"), ("dog/sub2", "x", "holds no pictures"), ("cat", "x", "cannot be read")],
)
def test_what_is_no_folder_of_pictures(folder: Path, name: str, prompt: str, said: str) -> None:
    (folder / "sub2").mkdir()
    with pytest.raises(DataError, match=said):
        open_plain(folder.parent / name, prompt)
