"""Against what follows from the definition, and against torch-fidelity's formula over all logits at once."""

from __future__ import annotations

import numpy as np
import pytest

from bksdm_evaluation.inception_score import SHUFFLE_SEED, Splits


def test_one_hot_predictions_of_all_classes_score_their_number() -> None:
    splits = Splits(40, splits=1)
    for _ in range(4):
        splits.add(np.eye(10) * 1000)
    assert splits.result().mean == pytest.approx(10)
    assert splits.result().deviation == pytest.approx(0)


def test_predictions_that_are_all_alike_score_one() -> None:
    uniform, alike = Splits(20), Splits(20)
    uniform.add(np.zeros((20, 7)))
    alike.add(np.tile([5.0, 1, 0, -3], (20, 1)))
    assert uniform.result().mean == pytest.approx(1)
    assert alike.result().mean == pytest.approx(1)


def test_batch_by_batch_is_all_at_once() -> None:
    """torch-fidelity 0.3.0's isc_features_to_metric, written out."""
    logits = np.random.default_rng(0).normal(0, 2, (103, 12))
    order = np.random.RandomState(SHUFFLE_SEED).permutation(103)
    p = np.exp(logits[order]) / np.exp(logits[order]).sum(1, keepdims=True)
    scores = []
    for i in range(10):
        chunk = p[i * 103 // 10 : (i + 1) * 103 // 10]
        scores.append(np.exp((chunk * (np.log(chunk) - np.log(chunk.mean(0)))).sum(1).mean()))
    splits = Splits(103)
    for start in range(0, 103, 8):
        splits.add(logits[start : start + 8].astype(np.float64))
    found = splits.result()
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.deviation == pytest.approx(np.std(scores), rel=1e-10)


def test_missing_pictures_are_noticed() -> None:
    splits = Splits(20)
    splits.add(np.zeros((19, 3)))
    with pytest.raises(ValueError, match="19 of 20 pictures"):
        splits.result()
