import json

import numpy as np
import pytest

from bksdm_evaluation.kept import kept


def test_an_array_is_made_once_per_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.arange(6).reshape(2, 3)

    key = {"seed": 0, "captions": ["a"]}
    for _ in range(2):
        np.testing.assert_array_equal(kept(tmp_path / "new" / "cache", key, make), [[0, 1, 2], [3, 4, 5]])
    assert len(made) == 1
    kept(tmp_path / "new" / "cache", {**key, "seed": 1}, make)
    assert len(made) == 2
    keys = [json.loads(path.read_text()) for path in (tmp_path / "new" / "cache").glob("*.json")]
    assert sorted(one["seed"] for one in keys) == [0, 1]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kept(None, {}, lambda: np.ones(2)).sum() == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"not an array"])
def test_a_damaged_array_is_made_anew(tmp_path, damage):
    kept(tmp_path, {}, lambda: np.zeros(3))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(damage)
    np.testing.assert_array_equal(kept(tmp_path, {}, lambda: np.ones(3)), np.ones(3))
    np.testing.assert_array_equal(np.load(path), np.ones(3))


def test_a_kill_while_it_is_kept_leaves_no_half_array(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path, {}, lambda: np.ones(3))
    assert list(tmp_path.iterdir()) == []
