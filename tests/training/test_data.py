import json

import pytest
import torch
from PIL import Image

from bksdm import checkpoint
from bksdm.sampling import token_ids
from bksdm_training.data import DataError, Order, read_folder, to_model_range, tokenize


def test_a_folder_is_read_resized_with_all_captions(mini_data):
    pictures = read_folder(mini_data / "train", 32)
    assert pictures.pixels.shape == (12, 3, 32, 32)
    assert pictures.pixels.dtype == torch.uint8
    assert pictures.captions[3] == ("disc 3", "3")
    assert pictures.names[3] == "3.png"


def test_a_folder_without_captions_lists_uses_its_text(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "black"}) + "\n")
    assert read_folder(tmp_path, 8).captions == (("black",),)


def test_no_metadata_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"has no metadata.jsonl: make one with bksdm-train data"):
        read_folder(tmp_path, 8)


def test_a_listing_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_folder(tmp_path, 8)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"text": "x"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "bad.png", "text": "x"}',
        '{"file_name": "bad.png", "captions": "disc"}',
        "[1]",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        read_folder(tmp_path, 8)


def test_model_range_ends_are_exact():
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_every_epoch_shows_every_picture_once_and_any_step_can_be_looked_up():
    order = Order(count=10, batch_size=4, seed=3)
    seen = torch.cat([order.batch(step) for step in range(1, 6)])  # 20 = two epochs
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(order.batch(3), seen[8:12])


def test_a_batch_larger_than_the_data_runs_over_epochs():
    assert len(Order(count=3, batch_size=8, seed=0).batch(1)) == 8


def test_captions_are_drawn_from_their_own_picture_and_dropped_as_often_as_asked(mini_data):
    pictures = read_folder(mini_data / "train", 8)
    tokenizer = checkpoint.tokenizer()
    tokens = tokenize(tokenizer, pictures.captions)
    rows = torch.full((4000,), 5)
    ids = tokens.draw(rows, 0.25, torch.Generator().manual_seed(0))
    full, short, empty = (token_ids(tokenizer, [text])[0] for text in ("disc 5", "5", ""))
    counts = [int((ids == one).all(1).sum()) for one in (full, short, empty)]
    assert sum(counts) == 4000
    assert counts == pytest.approx([1500, 1500, 1000], abs=120)  # four standard deviations
