"""What holds of every layout."""

from __future__ import annotations

import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from bksdm_training.data import DataError
from bksdm_training.sources import ShardOrder, open_source, read_or_next


def test_every_layout_gives_the_same_examples(dataset):
    source = open_source(dataset)
    assert len(source) == sum(source.shards) == 12
    examples = [source.read(index) for index in range(12)]
    assert [example.captions for example in examples] == [(f"number {n}",) for n in range(12)]
    assert [example.image.getpixel((0, 0)) for example in examples] == [(n, 0, 0) for n in range(12)]
    assert {(example.image.mode, example.image.size) for example in examples} == {("RGB", (8, 6))}
    assert len({example.key for example in examples}) == 12


def test_a_name_is_no_path(dataset, monkeypatch):
    assert open_source(dataset).name == "numbers"
    monkeypatch.chdir(dataset)
    assert open_source(Path()).name == "numbers"


@pytest.mark.parametrize("index", [-1, 12])
def test_no_example_lies_past_the_ends(dataset, index):
    with pytest.raises(IndexError, match="of 12"):
        open_source(dataset).read(index)


def test_a_licence_beside_the_data_is_read(dataset):
    assert open_source(dataset).licence is None
    (dataset / "LICENSE").write_text("Free.\n")
    assert open_source(dataset).licence == "Free.\n"


def test_a_split_has_its_data_sets_licence_and_no_stranger_folders(dataset):
    (dataset.parent / "LICENSE").write_text("Of the whole.\n")
    assert open_source(dataset).licence is None
    (dataset.parent / "dataset.json").write_text("{}")
    assert open_source(dataset).licence == "Of the whole.\n"


def test_a_licence_that_is_no_text_is_one_sentence(dataset):
    (dataset / "LICENSE").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="LICENSE cannot be read as text"):
        open_source(dataset)


def test_a_copy_has_the_same_identity_wherever_it_lies(dataset, tmp_path):
    first = open_source(dataset).identity
    copy = shutil.copytree(dataset, tmp_path / "elsewhere" / "renamed")
    assert open_source(copy).identity == first


@pytest.mark.parametrize("layout", ["jsonl", "csv", "tar", "parquet"])
def test_another_picture_or_caption_is_another_identity(make, tmp_path, layout, encode):
    folder = make[layout](tmp_path)
    before = open_source(folder).identity
    if layout in ("jsonl", "csv"):
        (folder / "3.png").write_bytes(encode(3, size=(90, 90)))
    elif layout == "tar":
        (folder / "00000.tar").unlink()
    else:
        (folder / "train-00000.parquet").unlink()
    assert open_source(folder).identity != before


def test_a_source_reads_on_after_pickling(dataset):
    source = open_source(dataset)
    source.read(0)
    packed = pickle.dumps(source)
    assert b"PNG" not in packed  # no picture that was read travels to a worker
    copy = pickle.loads(packed)
    assert (copy.read(7).captions, copy.identity) == (("number 7",), source.identity)


# torch looks at how many cores this process may use, and a machine with one is enough here
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_workers_read_what_one_process_reads(dataset):
    source = open_source(dataset)
    source.read(0)  # the workers must not share what this opened
    order = ShardOrder(source.shards, seed=1, window=2)
    positions = [order.index(position) for position in range(24)]
    expected = [source.read(index).key for index in positions]
    for workers in (1, 2):
        loader = DataLoader(
            positions,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=partial(read_or_next, source),
            multiprocessing_context="fork",
        )
        assert [example.key for example, _ in loader] == expected


def test_a_spawned_worker_gets_its_source_by_pickling(make, tmp_path):
    source = open_source(make["parquet"](tmp_path))
    source.read(0)
    loader = DataLoader(
        range(12),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        collate_fn=source.read,
        multiprocessing_context="spawn",
    )
    assert [example.captions[0] for example in loader] == [f"number {n}" for n in range(12)]


def test_a_single_file_is_a_source(make, tmp_path):
    for layout in make:
        (tmp_path / layout).mkdir()
        make[layout](tmp_path / layout)
    assert len(open_source(tmp_path / "csv" / "metadata.csv")) == 12
    assert len(open_source(tmp_path / "tar" / "00001.tar")) == 4
    assert open_source(tmp_path / "tar" / "00001.tar").name == "00001.tar"
    assert len(open_source(tmp_path / "parquet" / "train-00001.parquet")) == 5


def test_tars_come_before_the_metadata_that_img2dataset_puts_beside_them(make, tmp_path):
    make["tar"](tmp_path)
    (tmp_path / "00000.parquet").write_bytes(b"no images in here")
    assert open_source(tmp_path).shards == (5, 4, 3)


def test_two_listings_are_ambiguous(make, tmp_path):
    make["csv"](make["jsonl"](tmp_path))
    with pytest.raises(DataError, match=r"both metadata.jsonl and metadata.csv: give the path of the one"):
        open_source(tmp_path)


def test_no_data_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"there is no data at .*gone: give a folder with"):
        open_source(tmp_path / "gone")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"is no data set that is known here; it holds the folder train: give"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="no listing, tar or parquet file"):
        open_source(tmp_path / "notes.txt")


def test_missing_pyarrow_says_what_to_install(make, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "bksdm_training.sources.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an import of it finds then is nothing
    with pytest.raises(ModuleNotFoundError, match=r"need pyarrow: pip install 'bksdm\[training\]'") as raised:
        open_source(make["parquet"](tmp_path))
    assert raised.value.name == "pyarrow"
    (tmp_path / "tars").mkdir()
    assert len(open_source(make["tar"](tmp_path / "tars"))) == 12
