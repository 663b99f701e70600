"""The cache: the same as encoding on the way, resumable, and refused where it does not belong."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator

from bksdm import checkpoint
from bksdm_training import cache
from bksdm_training.config import DistillConfig, LoopConfig
from bksdm_training.data import DataError
from bksdm_training.examples import Feed
from bksdm_training.inputs import Inputs
from bksdm_training.material import open_material
from bksdm_training.records import ResumeError
from bksdm_training.sources import open_source

CONFIG = DistillConfig(size=64, loop=LoopConfig(steps=3, batch_size=4, learning_rate=1e-3), caption_dropout=0.25)


@pytest.fixture
def teacher(trained):
    return checkpoint.load(str(trained / "checkpoint"))


def _build(teacher, data, folder, **changes):
    options = {"size": 64, "dtype": "fp32", "shard_size": 5, "batch_size": 2, **changes}
    return cache.build(teacher, open_source(data), folder, Accelerator(cpu=True), **options)


@pytest.fixture
def cached(teacher, mini_data, tmp_path):
    return _build(teacher, mini_data / "train", tmp_path / "cache")


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 5e-7), ("fp16", 1e-3)])  # measured 8e-8, 2.2e-4
def test_inputs_are_those_without_a_cache(teacher, mini_data, tmp_path, dtype, limit):
    folder = _build(teacher, mini_data / "train", tmp_path / "cache", dtype=dtype)
    inputs = Inputs(teacher, torch.device("cpu"))
    feeds = [
        Feed(open_material(path, teacher, CONFIG).examples, batch_size=8, parts=1, process=0, processes=1, workers=0)
        for path in (mini_data / "train", folder)
    ]
    worst = 0.0
    for step in range(1, 6):  # three epochs of twelve and a bit
        plain, stored = (inputs(feed.batch(step, 0)) for feed in feeds)
        assert torch.equal(plain[1], stored[1])
        for a, b in zip(plain, stored, strict=True):
            worst = max(worst, ((a.float() - b.float()).norm() / a.float().norm()).item())
    assert worst < limit


def test_half_precision_is_read_within_a_bf16_run(teacher, mini_data, tmp_path):
    """torch.cat refuses float16 where a CPU computes in bf16: a run from a cache as it is stored ended at its start."""
    folder = _build(teacher, mini_data / "train", tmp_path / "cache", dtype="fp16")
    feed = Feed(
        open_material(folder, teacher, CONFIG).examples, batch_size=4, parts=1, process=0, processes=1, workers=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        batch = feed.batch(1, 0)
    assert batch.moments is not None
    assert (batch.moments.dtype, len(batch.moments)) == (torch.float16, 4)


def test_neither_encoder_is_run(teacher, cached, monkeypatch):
    monkeypatch.setattr(type(teacher.vae), "encode", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(type(teacher.text_encoder), "forward", lambda *_, **__: 1 / 0)
    feed = Feed(
        open_material(cached, teacher, CONFIG).examples, batch_size=8, parts=1, process=0, processes=1, workers=1
    )
    Inputs(teacher, torch.device("cpu"))(feed.batch(1, 0))


def test_finished_shards_are_kept_and_damaged_ones_made_again(teacher, mini_data, cached, monkeypatch):
    whole = {path.name: path.read_bytes() for path in cached.glob("shard-*")}
    assert len(whole) == 2 * 3
    second, third = cached / "shard-00001.safetensors", cached / "shard-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1] + b"\x01")
    third.with_suffix(".json").unlink()  # killed between the two files
    (cached / "cache.json").unlink()
    with pytest.raises(DataError, match="not whole"):
        open_material(cached, teacher, CONFIG)
    read = []
    original = cache.read_or_next
    monkeypatch.setattr(cache, "read_or_next", lambda source, i: read.append(i) or original(source, i))
    _build(teacher, mini_data / "train", cached)
    assert sorted(set(read) - {0}) == list(range(1, 12))  # captions for grids, and the shards 5-9 and 10-11
    assert not any(0 < i < 5 for i in read[:7])
    assert {path.name: path.read_bytes() for path in cached.glob("shard-*")} == whole


def test_a_killed_build_leaves_no_half_shard(teacher, mini_data, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.records, "save_tensors", lambda tensors, path: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _build(teacher, mini_data / "train", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_a_flipped_byte_is_found(teacher, cached):
    shard = cached / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged: run the bksdm-train cache command again"):
        open_material(cached, teacher, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 128}, "a cache for 64 px, not 128"),
        ({"flip": True}, "made without mirrored pictures"),
    ],
)
def test_another_size_or_flip_is_refused(teacher, mini_data, tmp_path, change, message):
    folder = _build(teacher, mini_data / "train", tmp_path / "cache", flip=False)
    config = DistillConfig(**{**CONFIG.__dict__, "flip": False, **change})
    with pytest.raises(DataError, match=message):
        open_material(folder, teacher, config)


def test_other_encoders_are_refused(teacher, cached):
    with torch.no_grad():
        next(teacher.vae.encoder.parameters()).add_(1)
    with pytest.raises(DataError, match="another model's encoders"):
        open_material(cached, teacher, CONFIG)


def test_other_data_in_the_same_folder_is_refused(teacher, mini_data, cached):
    with pytest.raises(ResumeError, match="begun with other data"):
        _build(teacher, mini_data / "unseen", cached)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_index_is_one_sentence(teacher, cached, content):
    (cached / "cache.json").write_text(content)
    with pytest.raises(DataError, match=r"cache"):
        open_material(cached, teacher, CONFIG)


def test_what_was_skipped_is_recorded_and_too_much_of_it_refused(teacher, mini_data, tmp_path):
    data = shutil.copytree(mini_data, tmp_path / "data")
    (data / "train" / "3.png").write_bytes(b"cut")
    folder = _build(teacher, data / "train", tmp_path / "cache", skip_limit=0.1)
    facts = json.loads((folder / "cache.json").read_text())
    assert facts["skipped"] == {"seen": 13, "reasons": {"unknown image format": 1}}
    for i in range(8):
        (data / "train" / f"{i}.png").write_bytes(b"cut")
    with pytest.raises(DataError, match="could not be used"):
        _build(teacher, data / "train", tmp_path / "other", skip_limit=0.01)


def test_files_are_as_readable_as_their_folder(cached):
    mode = cached.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o666 for path in cached.glob("*.safetensors")} == {mode}


def test_broken_pictures_in_a_row_are_counted_once_each(teacher, mini_data, tmp_path):
    data = shutil.copytree(mini_data, tmp_path / "data")
    for i in (3, 4, 5, 6):  # over the border of two shards
        (data / "train" / f"{i}.png").write_bytes(b"cut")
    folder = _build(teacher, data / "train", tmp_path / "cache", skip_limit=0.1)
    facts = json.loads((folder / "cache.json").read_text())
    assert facts["skipped"]["reasons"] == {"unknown image format": 4}
    again = _build(teacher, data / "train", folder, skip_limit=0.1)  # all is there
    assert json.loads((again / "cache.json").read_text()) == facts


def test_a_large_cache_is_opened_by_its_sizes(teacher, cached, monkeypatch):
    monkeypatch.setattr(cache, "HASHED_WHEN_OPENED", 0)
    monkeypatch.setattr(cache, "sha256", lambda path: 1 / 0)
    open_material(cached, teacher, CONFIG)
    shard = cached / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged"):
        open_material(cached, teacher, CONFIG)


def test_a_data_error_of_a_worker_is_one_sentence(teacher, mini_data, tmp_path):
    data = shutil.copytree(mini_data, tmp_path / "data")
    for i in range(12):
        (data / "train" / f"{i}.png").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"^12 examples in a row of train cannot be used") as caught:
        _build(teacher, data / "train", tmp_path / "cache", workers=1)
    assert "Traceback" not in str(caught.value)
