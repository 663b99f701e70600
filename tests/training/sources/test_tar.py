from __future__ import annotations

import gzip
import io
import json
import resource
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_training.data import DataError
from bksdm_training.sources import BrokenExample, open_source, tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def test_a_tar_is_a_shard(make, tmp_path):
    source = open_source(make["tar"](tmp_path))
    assert source.shards == (5, 4, 3)
    assert [source.read(index).key for index in (0, 4, 5, 11)] == [
        "00000.tar/0000",
        "00000.tar/0004",
        "00001.tar/0005",
        "00002.tar/0011",
    ]
    assert source.lost.seen == 0


@pytest.mark.parametrize("form", FORMATS)
def test_long_names_are_whole_in_every_tar_format(tmp_path, write_tar, encode, form):
    key = "/".join(["folder" * 4] * 6) + "/\u00fc" * (form != "ustar") + "/picture"
    path = write_tar(tmp_path / "x.tar", [(f"{key}.png", encode(3)), (f"{key}.txt", b"long")], FORMATS[form])
    example = open_source(path).read(0)
    assert (example.key, example.captions) == (f"x.tar/{key}", ("long",))


def test_captions_come_from_text_before_json_whatever_their_order(tmp_path, write_tar, encode):
    image, note = encode(1), json.dumps({"caption": "of json"}).encode()
    members = [
        *(("a.jpg", image), ("a.json", note), ("a.txt", b"of text")),
        *(("b.txt", b"of text"), ("b.json", note), ("b.webp", image)),
        *(("c.json", note), ("c.JPEG", image)),
    ]
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert [source.read(index).captions for index in range(3)] == [("of text",), ("of text",), ("of json",)]


def test_members_of_other_kinds_are_passed_over(tmp_path, write_tar, pairs, encode):
    members = [("folder/.DS_Store", b"x"), ("0001.seg.png", encode(2)), ("README", b"x"), *pairs([1]), ("1.cls", b"0")]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("dir.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("same.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0001.png"
            archive.addfile(member)
    source = open_source(path)
    assert (len(source), source.lost.seen) == (1, 0)
    assert source.read(0).image.getpixel((0, 0)) == (1, 0, 0)


def test_of_two_members_by_one_name_the_later_counts(tmp_path, write_tar, pairs, encode):
    source = open_source(write_tar(tmp_path / "x.tar", [*pairs([1, 2]), ("0001.png", encode(200))]))
    assert [source.read(index).image.getpixel((0, 0)) for index in range(2)] == [(200, 0, 0), (2, 0, 0)]


def test_hostile_names_are_refused_and_counted(tmp_path, write_tar, pairs, encode):
    hostile = ["../../etc/cron.png", "/etc/passwd.png", "a/../../b.png"]
    members = [
        *((name, encode(1)) for name in hostile),
        *pairs([7]),
        ("\x1b[2Jred.png", encode(1)),
        ("\x1b[2Jred.txt", b""),
    ]
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert dict(source.lost.reasons) == {"member name leaves the archive": 3}
    assert source.read(0).key == "x.tar/0007"
    with pytest.raises(BrokenExample, match=r"^'x\.tar/\\x1b\[2Jred' \(empty caption\)$"):  # nothing reaches a terminal
        source.read(1)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", None)], "missing caption"),
        ([("a.png", None), ("a.txt", b" \n")], "empty caption"),
        ([("a.png", None), ("a.txt", b"\xff")], "undecodable caption"),
        ([("a.png", None), ("a.json", b"{")], "undecodable caption"),
        ([("a.png", None), ("a.json", b"[]")], "undecodable caption"),
        ([("a.png", None), ("a.json", b'{"url": "x"}')], "missing caption"),
        ([("a.png", b""), ("a.txt", b"x")], "empty image"),
        ([("a.png", b"<html>"), ("a.txt", b"x")], "unknown image format"),
    ],
)
def test_a_broken_example_mid_shard_says_why_and_spares_the_rest(tmp_path, write_tar, pairs, encode, members, reason):
    filled = [(name, encode(3) if content is None else content) for name, content in members]
    source = open_source(write_tar(tmp_path / "x.tar", [*pairs([1]), *filled, *pairs([2])]))
    assert [source.read(index).captions for index in (0, 2)] == [("number 1",), ("number 2",)]
    with pytest.raises(BrokenExample) as raised:
        source.read(1)
    assert (raised.value.skip.key, raised.value.skip.reason) == ("x.tar/a", reason)


def test_a_caption_without_an_image_is_counted(tmp_path, write_tar, pairs):
    source = open_source(write_tar(tmp_path / "x.tar", [*pairs([1]), ("b.txt", b"x")]))
    assert (len(source), dict(source.lost.reasons)) == (1, {"caption without an image": 1})


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_tar_gives_its_whole_examples_at_every_cut(tmp_path, write_tar, pairs, form):
    """Cut at every 256th byte, inside the headers of long names too; the tar is reported once."""
    long = "" if form == "ustar" else "\u00fc" * 101
    members = [(long + name, content) for name, content in pairs(range(3))]
    whole = write_tar(tmp_path / "0.tar", members, FORMATS[form]).read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        ends = [member.offset_data + member.size for member in archive if member.name.endswith(".txt")]
        closing = archive.offset  # of the blocks of zeros that end a tar
    for cut in range(0, closing + 512, 256):
        (tmp_path / "1.tar").write_bytes(whole[:cut])
        source = open_source(tmp_path)
        expected = sum(end <= cut for end in ends)
        assert source.shards == (3, expected)
        assert [source.read(3 + n).captions for n in range(expected)] == [(f"number {n}",) for n in range(expected)]
        reasons = dict(source.lost.reasons)
        assert reasons.pop("truncated tar") == 1
        assert reasons in ({}, {"cut off with its tar": 1})


def test_a_tar_that_points_backwards_ends(tmp_path, write_tar, pairs):
    """A negative size sent tarfile round in circles (CVE-2025-8194, in Python before August 2025)."""
    content = write_tar(tmp_path / "x.tar", pairs([1])).read_bytes()
    member = tarfile.TarInfo("back.png")
    member.size = -1024
    (tmp_path / "x.tar").write_bytes(content[:2048] + member.tobuf(tarfile.GNU_FORMAT) + content[2048:])
    source = open_source(tmp_path)
    assert (len(source), list(source.lost.reasons)) == (1, ["damaged tar"])


def test_what_follows_damage_is_lost_and_reported(tmp_path, write_tar, pairs):
    path = write_tar(tmp_path / "x.tar", pairs(range(4)))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        place = archive.getmember("0002.png").offset_data - 512
    content[place : place + 100] = b"?" * 100
    path.write_bytes(content)
    source = open_source(path)
    assert len(source) == 2
    assert [(skip.reason, skip.detail) for skip in source.lost.first] == [("damaged tar", f"no header at byte {place}")]


def test_no_example_at_all_is_one_sentence(tmp_path, write_tar):
    write_tar(tmp_path / "0.tar", [("notes", b"x")])
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"holds no example in 2 tars \(lost: {'truncated tar': 1}\): each needs KEY.jpg"
    ):
        open_source(tmp_path)


def test_a_tar_that_cannot_be_read_is_one_sentence(make, tmp_path):
    (make["tar"](tmp_path) / "00009.tar").symlink_to("gone")
    with pytest.raises(DataError, match=r"00009\.tar cannot be read \(No such file or directory\): mend or remove it"):
        open_source(tmp_path)


def test_keys_that_are_no_text_stay_apart(tmp_path, write_tar, pairs):
    path = write_tar(tmp_path / "x.tar", pairs([1, 2]), tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [content[member.offset : member.offset + 512] for member in archive]
    for old, name in zip(headers, (b"\xfe.png", b"\xfe.txt", b"\xff.png", b"\xff.txt"), strict=True):
        member = tarfile.TarInfo.frombuf(old, "utf-8", "surrogateescape")
        member.name = name.decode(errors="surrogateescape")
        content = content.replace(old, member.tobuf(tarfile.USTAR_FORMAT, errors="surrogateescape"))
    path.write_bytes(content)
    source = open_source(path)
    assert [source.read(index).key for index in range(2)] == ["x.tar/\\xfe", "x.tar/\\xff"]


def test_a_compressed_tar_is_refused_by_name_or_content(tmp_path, write_tar, pairs):
    path = write_tar(tmp_path / "a.tar", pairs([1]))
    packed = gzip.compress(path.read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(packed)
    with pytest.raises(
        DataError, match=r"b\.tar\.gz is compressed, and examples are read by their offset: make it a plain"
    ):
        open_source(tmp_path)
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tar")
    with pytest.raises(DataError, match=r"b\.tar is compressed"):
        open_source(tmp_path)


def test_a_tar_that_shrinks_under_a_run_breaks_examples_not_the_run(make, tmp_path):
    source = open_source(make["tar"](tmp_path))
    (tmp_path / "00002.tar").write_bytes(b"")
    with pytest.raises(BrokenExample, match="the tar changed since it was opened"):
        source.read(11)
    (tmp_path / "00002.tar").unlink()
    with pytest.raises(BrokenExample, match="missing file"):
        source.read(11)


def test_a_kept_index_is_used_as_long_as_the_tars_are_the_same(make, tmp_path, write_tar, pairs, monkeypatch):
    (data := tmp_path / "data").mkdir()
    (make["tar"](data) / "00003.tar").write_bytes(b"")
    index = tmp_path / "run" / "index.npz"
    first = open_source(data, index=index)
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_build", lambda tars: pytest.fail("indexed again"))
        again = open_source(data, index=index)
    assert (again.identity, again.lost) == (first.identity, first.lost)
    assert again.read(11).captions == ("number 11",)
    write_tar(data / "00003.tar", pairs([50]))
    assert open_source(data, index=index).read(12).captions == ("number 50",)
    assert [entry.name for entry in index.parent.iterdir()] == ["index.npz"]
    assert sorted(entry.name for entry in data.iterdir()) == [f"0000{n}.tar" for n in range(4)]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", None])
def test_a_damaged_index_is_made_again(make, tmp_path, damage):
    index = tmp_path / "index.npz"
    (data := tmp_path / "data").mkdir()
    make["tar"](data)
    open_source(data, index=index)
    index.write_bytes(index.read_bytes()[:-200] if damage is None else damage)
    assert len(open_source(data, index=index)) == 12


def resident() -> int:
    """Bytes of memory that this process has now; the peak would be an earlier test's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_does_not_grow_with_the_tar(tmp_path):
    """300 images of 0.6 MB: one at a time is held, never the 180 MB."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (450, 450, 3), dtype=np.uint8)).save(file, "PNG", compress_level=0)
    content = file.getvalue()
    path = tmp_path / "big.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(300):
            for name, part in ((f"{number}.png", content), (f"{number}.txt", b"noise")):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    open_source(path).read(0)  # what is only loaded once
    before, grown = resident(), 0
    tracemalloc.start()  # sees what is only held for a moment; resident() what Pillow holds
    try:
        source = open_source(path)
        for index in range(300):
            source.read(index)
            grown = max(grown, resident() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 180e6
    assert peak < 4e6  # measured 0.81 MB: an image's bytes and the index
    assert grown < 10e6  # measured 0: the first read already took what an image needs
