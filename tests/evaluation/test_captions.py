"""Files of captions as their writers write them, and the draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bksdm_evaluation.captions import Caption, CaptionsError, read_captions

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "COCO_val2014_7.jpg"}],
    "annotations": [
        {"id": 3, "image_id": 42, "caption": "A shoe rack. "},
        {"id": 1, "image_id": 42, "caption": "Shoes on a rack"},
        {"id": 2, "image_id": 7, "caption": "A door"},
    ],
}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_of_cocos_captions_the_seed_chooses_one_for_each_picture(tmp_path: Path) -> None:
    path = write(tmp_path, "captions_val2014.json", json.dumps(COCO))
    found = {seed: read_captions(path, draw_seed=seed) for seed in range(12)}
    assert all(
        [row.name for row in one.rows] == ["COCO_val2014_7", "COCO_val2014_000000000042"] for one in found.values()
    )
    chosen = {one.rows[1].text for one in found.values()}
    assert chosen == {"A shoe rack.", "Shoes on a rack"}
    assert found[3].identity() == {"file": path.name, "sha256": found[0].sha256, "count": 2, "draw_seed": 3}
    shuffled = {**COCO, "annotations": COCO["annotations"][::-1], "images": COCO["images"][::-1]}
    again = read_captions(write(tmp_path, "other.json", json.dumps(shuffled)), draw_seed=5)
    assert again.rows == found[5].rows  # the order of the file decides nothing


def test_a_table_is_read_by_its_headers_or_as_the_published_reader_does(tmp_path: Path) -> None:
    named = write(tmp_path, "a.csv", 'text,file_name\n"a cat, asleep",im/1.jpg\nein B\u00e4r,2.jpg\n')
    assert read_captions(named).rows == (Caption("1", "a cat, asleep"), Caption("2", "ein B\u00e4r"))
    plain = write(tmp_path, "b.csv", "img,prompt\n1.jpg,a cat\n")
    assert read_captions(plain).rows == (Caption("1", "a cat"),)
    assert read_captions(plain).draw_seed is None


def test_lines_of_text_and_of_json(tmp_path: Path) -> None:
    lines = write(tmp_path, "a.txt", "a cat\n\n  a dog \n")
    assert read_captions(lines).rows == (Caption("000000", "a cat"), Caption("000001", "a dog"))
    rows = write(tmp_path, "a.jsonl", '{"file_name": "x.png", "text": "a cat", "captions": []}\n')
    assert read_captions(rows).rows == (Caption("x", "a cat"),)


def test_a_larger_draw_begins_with_a_smaller_one(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\n".join(f"caption {i}" for i in range(50)))
    ten, twenty = read_captions(path, 10, 4).rows, read_captions(path, 20, 4).rows
    assert twenty[:10] == ten
    assert len(set(twenty)) == 20
    assert read_captions(path, 10, 5).rows != ten
    assert read_captions(path, 10, 4).draw_seed == 4


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", "[1]", "a.json is not COCO's captions"),
        ("a.json", "{", "a.json is not COCO's captions"),
        ("a.json", '{"images": [], "annotations": [{"id": 1}]}', "image_id is missing"),
        ("a.csv", "file_name,text\n1.jpg\n", "a row has fewer columns than its header"),
        ("a.csv", "file_name,text\n", "a.csv holds no caption"),
        ("a.csv", "file_name,text\n1.jpg,a\n1.png,b\n", "names 1 pictures more than once .1, "),
        ("a.csv", "file_name,text\n../..,a\n", "is no name of a picture"),
        ("a.jsonl", '{"file_name": "x", "text": 3}', "'3' is no text"),
        ("a.txt", " \n", "holds no caption"),
        ("a.xml", "", "no file of captions that is known: give one of .json, .csv"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, name: str, text: str, why: str) -> None:
    with pytest.raises(CaptionsError, match=why):
        read_captions(write(tmp_path, name, text))


def test_too_few_captions_missing_files_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(CaptionsError, match="has 1 captions of pictures, and 2 are wanted"):
        read_captions(write(tmp_path, "a.txt", "x"), 2)
    with pytest.raises(CaptionsError, match="cannot be read: No such file"):
        read_captions(tmp_path / "gone.txt")
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(CaptionsError, match="is not UTF-8 text: byte 2 is 0xff"):
        read_captions(tmp_path / "b.txt")
