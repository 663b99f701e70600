"""Moments that merge, the sample that belongs to names, and files as pytorch-fid's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bksdm_evaluation import feature_set
from bksdm_evaluation.feature_set import Accumulator, FeatureSet, FeatureSetError, load
from bksdm_evaluation.statistics import Statistics, frechet_distance

SAID = {"protocol": "clean", "size": 256, "network": "n"}
RANDOM = np.random.default_rng(0)
NAMES = [f"picture {i}" for i in range(90)]
FEATURES = RANDOM.normal(1, 2, (90, 5)) @ RANDOM.normal(size=(5, 5)) + 10


def of(places: list[int], batch: int = 7) -> FeatureSet:
    taken = Accumulator(5)
    for start in range(0, len(places), batch):
        these = places[start : start + batch]
        taken.add([NAMES[i] for i in these], FEATURES[these])
    return taken.result(SAID)


def test_a_merge_of_shards_is_the_whole_in_any_order() -> None:
    whole = of(list(range(90)))
    other = Statistics.of(RANDOM.normal(9, 3, (80, 5)))
    distance = frechet_distance(whole, other)
    for order in ((0, 1, 2), (2, 0, 1)):
        parts = [of(list(range(i, 90, 3))[:: 1 if i else -1]) for i in order]
        merged = parts[0] + parts[1] + parts[2]
        assert merged.count == 90
        np.testing.assert_array_equal(merged.keys, whole.keys)
        np.testing.assert_array_equal(merged.sample, whole.sample)
        assert abs(frechet_distance(merged, other) - distance) <= 1e-12 * distance  # measured 6e-16
    np.testing.assert_allclose(whole.mean, FEATURES.mean(0), rtol=1e-13)
    np.testing.assert_allclose(whole.covariance, np.cov(FEATURES.T), rtol=1e-12)  # measured 3e-14


def test_the_sample_is_of_the_same_names_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "SAMPLE", 10)
    forwards, backwards = of(list(range(90)), 3), of(list(range(89, -1, -1)), 50)
    np.testing.assert_array_equal(forwards.keys, backwards.keys)
    np.testing.assert_array_equal(forwards.sample, backwards.sample)
    merged = of(list(range(40))) + of(list(range(40, 90)))
    np.testing.assert_array_equal(merged.sample, forwards.sample)
    assert len(forwards.sample) == 10


def test_a_picture_counted_twice_is_noticed() -> None:
    with pytest.raises(FeatureSetError, match="share pictures"):
        of([0, 1, 2]) + of([2, 3, 4])


def test_sets_that_were_prepared_otherwise_do_not_add_up() -> None:
    one = of([0, 1, 2])
    other = FeatureSet(**{**vars(of([3, 4])), "said": {**SAID, "protocol": "published"}})
    with pytest.raises(FeatureSetError, match=r"statistics of .*clean.* and of .*published.* do not add up"):
        one + other


def test_a_file_holds_all_and_is_pytorch_fids_too(tmp_path: Path) -> None:
    whole = of(list(range(90)))
    path = tmp_path / "real.npz"
    whole.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = load(path, {})
    assert (again.count, again.said) == (90, SAID)
    np.testing.assert_array_equal(again.keys, whole.keys)
    np.testing.assert_array_equal(again.sample, whole.sample)
    with np.load(path) as theirs:  # pytorch-fid's compute_statistics_of_path
        mu, sigma = theirs["mu"][:], theirs["sigma"][:]
    np.testing.assert_array_equal(mu, whole.mean)
    np.testing.assert_array_equal(sigma, whole.covariance)


def test_pytorch_fids_own_file_is_read_and_believed(tmp_path: Path) -> None:
    path = tmp_path / "theirs.npz"
    np.savez_compressed(path, mu=FEATURES.mean(0), sigma=np.cov(FEATURES.T))
    found = load(path, SAID)
    assert (found.count, found.said, len(found.sample)) == (None, SAID, 0)
    assert frechet_distance(found, of(list(range(90)))) == pytest.approx(0, abs=1e-9)
    with pytest.raises(FeatureSetError, match="do not say how many pictures"):
        found + of([0, 1])


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "do not go together"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.zeros((2, 2)), "keys": np.zeros(4, np.uint64)}, "4 keys and a sample"),
    ],
)
def test_files_that_hold_something_else_are_one_sentence(tmp_path: Path, arrays: dict, why: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(FeatureSetError, match=rf"x.npz holds no statistics of pictures: .*{why}"):
        load(path, SAID)


def test_a_damaged_file_and_none_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    of([0, 1, 2]).save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(FeatureSetError, match="holds no statistics of pictures"):
        load(path, SAID)
    with pytest.raises(FeatureSetError, match="cannot be read: No such file"):
        load(tmp_path / "gone.npz", SAID)
