from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bksdm_training.data import DataError
from bksdm_training.sources import BrokenExample, ShardOrder, open_source, parquet


def write(path, rows, **options):
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path, **options)
    return path


def test_a_row_group_is_a_shard(make, tmp_path):
    source = open_source(make["parquet"](tmp_path))
    assert source.shards == (4, 3, 4, 1)
    assert source.read(4).key == "train-00000.parquet/1/0"
    assert source.read(11).key == "train-00001.parquet/1/0"


def test_images_may_be_plain_bytes_and_captions_lists(tmp_path, encode):
    rows = [{"image": encode(4), "caption": ["one", "two"], "captions": ["two", "three"], "id": 5}]
    example = open_source(write(tmp_path / "x.parquet", rows)).read(0)
    assert (example.captions, example.image.getpixel((0, 0))) == (("one", "two", "three"), (4, 0, 0))


def test_text_comes_before_caption(tmp_path, encode):
    rows = [{"image": encode(4), "caption": "second", "text": "first"}]
    assert open_source(write(tmp_path / "x.parquet", rows)).read(0).captions == ("first",)


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.large_list(pa.string())]
)
def test_texts_of_every_arrow_type(tmp_path, encode, kind):
    values = [["pear"]] if pa.types.is_large_list(kind) else ["pear"]
    table = pa.table({"image": pa.array([encode(4)], pa.large_binary()), "text": pa.array(values, kind)})
    assert open_source(write(tmp_path / "x.parquet", table)).read(0).captions == ("pear",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": {"bytes": b"<html>"}}, "unknown image format"),
        ({"image": {"bytes": b""}}, "empty image"),
        ({"image": {"bytes": None}}, "missing file"),
        ({"image": None}, "missing file"),
        ({"text": ""}, "empty caption"),
        ({"text": None}, "missing caption"),
    ],
)
def test_a_broken_row_says_which_and_why(tmp_path, encode, row, reason):
    whole = {"image": {"bytes": encode(1), "path": "1.png"}, "text": "one"}
    source = open_source(write(tmp_path / "x.parquet", [whole, {**whole, **row}, whole]))
    assert source.read(2).captions == ("one",)
    with pytest.raises(BrokenExample) as raised:
        source.read(1)
    assert (raised.value.skip.key, raised.value.skip.reason) == ("x.parquet/0/1", reason)


def test_a_text_that_is_no_utf8_is_a_broken_caption(tmp_path, encode):
    texts = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    path = write(tmp_path / "x.parquet", pa.table({"image": pa.array([encode(1)]), "text": texts}))
    with pytest.raises(BrokenExample, match="undecodable caption"):
        open_source(path).read(0)


def test_columns_that_do_not_do_are_listed(tmp_path):
    write(tmp_path / "x.parquet", [{"URL": "http://x", "TEXT": "x", "width": 4}])
    with pytest.raises(
        DataError, match=r"needs a column image .*it has URL \(string\), TEXT \(string\), width \(int64\)"
    ):
        open_source(tmp_path)


def test_files_of_other_columns_are_not_mixed(tmp_path, encode):
    write(tmp_path / "a.parquet", [{"image": encode(1), "text": "x"}])
    write(tmp_path / "b.parquet", [{"image": encode(1), "caption": "x"}])
    with pytest.raises(DataError, match=r"b\.parquet has other columns than a\.parquet"):
        open_source(tmp_path)


def test_a_cut_file_is_one_sentence(make, tmp_path):
    make["parquet"](tmp_path)
    path = tmp_path / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train-00001\.parquet cannot be read as parquet \(.*\): fetch it again"):
        open_source(tmp_path)


def test_no_rows_are_one_sentence(tmp_path):
    write(tmp_path / "x.parquet", pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}))
    with pytest.raises(DataError, match="holds no row in 1 parquet file"):
        open_source(tmp_path)


def test_a_damaged_row_group_breaks_its_examples_only(tmp_path, encode):
    rows = [{"image": {"bytes": encode(n)}, "text": f"number {n}"} for n in range(8)]
    path = write(tmp_path / "x.parquet", rows, row_group_size=4, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(BrokenExample, match="unreadable row group"):
        source.read(1)
    assert source.read(5).captions == ("number 5",)


def test_a_row_group_of_the_window_is_read_once_and_memory_is_bounded(tmp_path, encode, monkeypatch):
    rows = [{"image": {"bytes": encode(n)}, "text": f"number {n}"} for n in range(40)]
    path = write(tmp_path / "x.parquet", rows, row_group_size=4)
    size = max(group.size for group in open_source(path).groups)
    monkeypatch.setattr(parquet, "KEPT", 3 * size + 10)
    source = open_source(path)
    assert source.window == 3
    reads = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: reads.append(i) or plain(self, i, **options)
    )
    order = ShardOrder(source.shards, seed=0, window=source.window)
    for position in range(40):
        source.read(order.index(position))
        assert len(source._kept) <= 3
    assert sorted(reads) == list(range(10))


def test_a_row_group_larger_than_what_is_kept_is_still_read(make, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT", 1)
    source = open_source(make["parquet"](tmp_path))
    assert source.window == 1
    assert [source.read(index).captions[0] for index in (0, 11, 1)] == ["number 0", "number 11", "number 1"]
