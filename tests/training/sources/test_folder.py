from __future__ import annotations

import json

import pytest

from bksdm_training.data import DataError
from bksdm_training.sources import BrokenExample, open_source


@pytest.fixture
def folder(tmp_path, encode):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encode(9))
    return tmp_path


def captions(folder):
    source = open_source(folder)
    return [source.read(index).captions for index in range(len(source))]


def test_csv_texts_keep_quotes_commas_and_line_ends(folder):
    text = 'file_name,text\r\na.png,"a ""red"" apple,\r\nwith a leaf"\r\n\r\nb.png,plain\r\n'
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert captions(folder) == [('a "red" apple,\r\nwith a leaf',), ("plain",)]


def test_csv_columns_may_come_in_any_order_with_others_between(folder):
    (folder / "metadata.csv").write_text("id,caption,file_name\n1,pear,a.png\n2,\u00e9t\u00e9 \u2028,b.png")
    assert captions(folder) == [("pear",), ("\u00e9t\u00e9",)]


def test_jsonl_texts_keep_what_only_python_takes_for_line_ends(folder):
    rows = [{"file_name": "a.png", "text": "one\u2028two\u0085three"}, {"file_name": "b.png", "text": "x"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert captions(folder) == [("one\u2028two\u0085three",), ("x",)]


def test_the_canonical_caption_comes_first_and_none_twice(folder):
    row = {"file_name": "a.png", "text": " pear ", "captions": ["a pear", "", "pear", "a pear"]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert captions(folder) == [("pear", "a pear")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x", "file_name": "gone.png"}, "missing file"),
        ({"text": "x", "file_name": "nul\0.png"}, "unreadable file"),
        ({"text": "x", "file_name": "."}, "unreadable file"),
        ({"text": "x", "file_name": "bad.png"}, "unknown image format"),
        ({"text": "x", "file_name": "cut.png"}, "undecodable image"),
        ({"text": "x", "file_name": "none.png"}, "empty image"),
        ({"file_name": "a.png"}, "missing caption"),
        ({"text": None, "file_name": "a.png"}, "missing caption"),
        ({"text": " \n", "file_name": "a.png"}, "empty caption"),
        ({"text": 5, "file_name": "a.png"}, "undecodable caption"),
        ({"text": "\ud800", "file_name": "a.png"}, "undecodable caption"),
    ],
)
def test_a_broken_example_says_which_and_why(folder, encode, row, reason):
    (folder / "bad.png").write_bytes(b"not a picture")
    (folder / "cut.png").write_bytes(encode(1, size=(64, 64))[:-30])
    (folder / "none.png").write_bytes(b"")
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(BrokenExample) as raised:
        open_source(folder).read(0)
    assert (raised.value.skip.key, raised.value.skip.reason) == (row["file_name"], reason)


def test_a_csv_row_cut_short_is_a_missing_caption(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png\n")
    with pytest.raises(BrokenExample, match=r"'a.png' \(missing caption\)"):
        open_source(folder).read(0)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../x.png", ".."])
def test_a_path_that_leaves_the_folder_is_refused(folder, name):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(DataError, match=r"metadata.jsonl, line 1: file_name .* leaves the folder"):
        open_source(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "a row must be an object"),
        ('{"text": "x"}', "a row has no file_name"),
        ('{"text": "x", "file_name": ""}', "a row has no file_name"),
        ('{"text": "x", "file_name": 4}', "a row has no file_name"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_jsonl_line_is_named(folder, line, message):
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"metadata\.jsonl, line 3: .*{message}"):
        open_source(folder)


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ("file_name,text\na.png,one, two\n", 2, "3 values for 2 columns; quote texts that hold commas"),
        ('file_name,text\na.png,"open\nb.png,x\n', 3, "unexpected end of data"),
        ("file_name,text\n,x\n", 2, "a row has no file_name"),
        (
            "file_name\ttext\na.png\tx\n",
            1,
            r"must name the columns file_name and text, separated by commas; found 'file",
        ),
        ("", 0, "found nothing"),
    ],
)
def test_a_bad_csv_line_is_named(folder, rows, line, message):
    (folder / "metadata.csv").write_text(rows)
    with pytest.raises(DataError, match=rf"metadata\.csv, line {line}: .*{message}"):
        open_source(folder)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_listing_that_is_no_text_is_one_sentence(folder, name):
    (folder / name).write_bytes(b"file_name,text\n\xff\xfe,x\n")
    with pytest.raises(DataError, match=rf"{name}, line [12]: "):
        open_source(folder)


def test_an_empty_listing_is_one_sentence(folder):
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(DataError, match="is empty"):
        open_source(folder)


def test_an_image_listed_twice_has_two_keys(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,x\na.png,two\n")
    source = open_source(folder)
    assert [source.read(index).key for index in range(3)] == ["a.png", "b.png", "a.png#2"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("text", ["", '{"file_name": "../../a.png", "tex', "[1]", "\n" * 80, '"' * 81])
def test_a_listing_that_changes_under_a_run_breaks_examples_not_the_run(folder, name, text):
    row = json.dumps({"file_name": "a.png", "text": "x"}) if name.endswith("jsonl") else "file_name,text\na.png,x"
    (folder / name).write_text(row)
    source = open_source(folder)
    (folder / name).write_text(text)
    assert len(source.identity) == 64
    with pytest.raises(BrokenExample, match="listing changed since it was opened"):
        source.read(0)


def test_a_missing_image_has_a_place_in_the_identity(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    before = open_source(folder).identity
    (folder / "a.png").unlink()
    assert open_source(folder).identity != before
