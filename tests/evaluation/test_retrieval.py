import json

import numpy as np
import pytest
from PIL import Image

from bksdm_evaluation.retrieval import DatasetError, ScoreError, rank, read_dataset


def test_ranks_count_the_pictures_that_are_nearer():
    dataset = np.eye(4, dtype=np.float32)
    generated = np.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.4, 0.3, 0.2]], np.float32)
    generated /= np.linalg.norm(generated, axis=1, keepdims=True)
    result = rank(generated, dataset, own=[0, 1, 3])
    assert result.ranks.tolist() == [0, 1, 3]
    assert (result.top(1), result.top(2), result.top(5)) == (pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)


def test_features_that_say_nothing_score_nothing():
    same = np.full((3, 4), 0.5, np.float32)
    assert rank(same, same, own=[0, 1, 2]).ranks.tolist() == [2, 2, 2]
    with pytest.raises(ScoreError, match="not finite"):
        rank(np.full((3, 4), np.nan, np.float32), same, own=[0, 1, 2])


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"text": "x"}'])
def test_a_broken_listing_is_one_sentence(tmp_path, content):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_dataset(tmp_path, 8)


def test_captions_are_chosen_evenly_and_always_the_same(tmp_path):
    rows = []
    for i in range(10):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    dataset = read_dataset(tmp_path, 8)
    assert dataset.chosen(4) == [0, 3, 6, 9]
    assert dataset.chosen(99) == list(range(10))
    assert dataset.pictures[3].size == (8, 8)


def test_no_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(DatasetError, match="make one with bksdm-train data"):
        read_dataset(tmp_path, 8)
