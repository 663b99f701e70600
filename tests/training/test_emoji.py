import io
import json
import shutil
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from bksdm import packages
from bksdm_training import emoji
from bksdm_training.emoji import Emoji, captions, is_unseen, with_article


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("octopus", "an octopus"),
        ("grapes", "grapes"),
        ("women wrestling", "women wrestling"),
        ("grinning face with big eyes", "a grinning face with big eyes"),
        ("eye", "an eye"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("one o'clock", "a one o'clock"),
        ("onion", "an onion"),
        ("ewe", "a ewe"),
        ("euro banknote", "a euro banknote"),
        ("hourglass done", "an hourglass done"),
        ("x-ray", "an x-ray"),
    ],
)
def test_articles(name, expected):
    assert with_article(name) == expected


def test_captions_start_with_the_canonical_one_and_name_the_style():
    texts = captions(Emoji("red apple", ("apple", "fruit", "red", "food", "diet"), "1f34e"), "3d")
    assert texts[0] == "a red apple, 3d icon"
    assert "red apple" in texts
    assert "red apple, fruit" in texts  # keywords that the name already says are left out
    assert len(set(texts)) == len(texts)


def test_about_one_concept_in_twenty_is_unseen_and_always_the_same():
    names = [f"concept {i}" for i in range(4000)]
    held_out = {name for name in names if is_unseen(name)}
    assert 150 < len(held_out) < 250
    assert held_out == {name for name in names if is_unseen(name)}


def _archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    """Archives of the real layout with four emoji: a transparent and an opaque picture, a flag, a skin tone."""
    rows = [
        {"label": "Red Apple", "hexcode": "1F34E", "group": 4, "tags": ["fruit"]},
        {"label": "watch", "hexcode": "231A", "group": 5, "tags": []},
        {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "group": 9},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    webp = io.BytesIO()
    Image.new("RGBA", (256, 256), (255, 0, 0, 128)).save(webp, "WEBP", lossless=True)
    names = ("1f34e", "231a-fe0f", "1f1eb-1f1f7", "1f34e-1f3fb")
    icons = {"width": 128, "height": 128, "icons": {"apple": {"body": '<rect width="128" height="64" fill="#00f"/>'}}}
    made = {
        "emojibase-data": {"package/en/data.json": json.dumps(rows).encode()},
        "@lobehub/fluent-emoji-3d": {f"package/assets/{name}.webp": webp.getvalue() for name in names},
        "@iconify-json/noto": {
            "package/icons.json": json.dumps(icons).encode(),
            "package/chars.json": json.dumps({"1f34e": "apple", "231a": "missing"}).encode(),
        },
    }
    for name, files in made.items():
        _archive(tmp_path / packages.PACKAGES[name].file, files)
    monkeypatch.setattr(emoji, "fetch", lambda name: tmp_path / packages.PACKAGES[name].file)


@pytest.mark.usefixtures("fake_packages")
def test_the_folder_holds_chosen_emoji_on_white_with_captions(tmp_path):
    summary = emoji.build(tmp_path / "out", size=64)
    rows = [
        json.loads(line)
        for split in ("train", "unseen")
        for line in (tmp_path / "out" / split / "metadata.jsonl").read_text().splitlines()
        if line
    ]
    assert {row["file_name"] for row in rows} == {"fluent-1f34e.png", "fluent-231a.png", "noto-1f34e.png"}
    splits = {split for split in ("train", "unseen") if (tmp_path / "out" / split / "fluent-1f34e.png").exists()}
    with Image.open(tmp_path / "out" / splits.pop() / "fluent-1f34e.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        assert picture.getpixel((5, 5)) == (255, 127, 127)  # half-transparent red on white
    assert sum(summary["counts"].values()) == 3
    notice = (tmp_path / "out" / "LICENSE").read_text()
    assert "Microsoft Corporation" in notice
    assert "Apache License" in notice


@pytest.mark.usefixtures("fake_packages")
def test_groups_are_left_out_on_request(tmp_path):
    summary = emoji.build(tmp_path / "out", groups=("food-drink",), size=32)
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"fluent-1f34e.png", "noto-1f34e.png"}
    assert summary["groups"] == ["food-drink"]


@pytest.mark.usefixtures("fake_packages")
def test_a_concept_is_in_one_split_in_every_style(tmp_path):
    emoji.build(tmp_path / "out", size=32)
    homes = {path.parent.name for path in (tmp_path / "out").rglob("*1f34e.png")}
    assert len(homes) == 1


def test_an_existing_folder_is_not_touched(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        emoji.build(tmp_path)


@pytest.mark.usefixtures("fake_packages")
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "licence_notice", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        emoji.build(tmp_path / "sub" / "out", size=32)
    assert list((tmp_path / "sub").iterdir()) == []


_KILLED = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from bksdm_training import emoji
with emoji.scratch(Path({output!r}).parent, ".out.building-") as staging:
    (staging / "train").mkdir()
    print("building", flush=True)
    sys.stdin.read()
    os._exit(9)
"""


@pytest.mark.usefixtures("fake_packages")
def test_what_a_killed_build_left_is_removed_and_what_a_running_one_holds_is_not(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".out-notes").mkdir()  # the user's own
    program = _KILLED.format(path=sys.path, output=str(home / "out"))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "building\n"
        [held] = home.glob(".out.building-*")
        emoji.build(home / "out", size=32)
        assert (held / "train").is_dir()
    assert held.is_dir()  # it was killed
    emoji.build(home / "second", size=32)  # another folder's build is none of this one's business
    assert held.is_dir()
    shutil.rmtree(home / "out")
    emoji.build(home / "out", size=32)
    assert {path.name for path in home.iterdir()} == {"out", "second", ".out-notes"}
