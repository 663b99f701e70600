from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bksdm_training.data import DataError
from bksdm_training.sources import ShardOrder

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


@settings(max_examples=100, deadline=None)
@given(shards=SHARDS, seed=st.integers(0, 2**64 - 1), window=st.integers(1, 9), epoch=st.integers(0, 1000))
def test_an_epoch_shows_each_example_once(shards, seed, window, epoch):
    order = ShardOrder(shards, seed, window)
    positions = range(epoch * order.count, (epoch + 1) * order.count)
    assert sorted(order.index(position) for position in positions) == list(range(sum(shards)))
    assert {order.epoch(position) for position in positions} == {epoch}


@settings(max_examples=100, deadline=None)
@given(
    shards=SHARDS, seed=st.integers(0, 9), window=st.integers(1, 4), workers=st.integers(1, 5), batch=st.integers(1, 5)
)
def test_the_order_is_the_same_for_any_workers_and_after_any_restart(shards, seed, window, workers, batch):
    straight = ShardOrder(shards, seed, window)
    expected = [straight.index(position) for position in range(60)]
    copies = [pickle.loads(pickle.dumps(straight)) for _ in range(workers)]  # batches are dealt to workers in turn
    assert [copies[position // batch % workers].index(position) for position in range(60)] == expected
    assert [ShardOrder(shards, seed, window).index(position) for position in (59, 31, 7)] == [
        expected[p] for p in (59, 31, 7)
    ]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 7), size=st.integers(1, 6), window=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_window_of_positions_reads_from_no_more_shards_than_the_window(count, size, window, seed):
    order = ShardOrder([size] * count, seed, window)
    for epoch in range(3):
        shards = [order.index(epoch * order.count + place) // size for place in range(order.count)]
        runs = [shards[start : start + window * size] for start in range(0, order.count, window * size)]
        assert all(len(set(run)) == min(window, len(run) // size) for run in runs)


def test_epochs_and_seeds_differ_and_shards_are_mixed_within_the_window():
    shards, window = [10] * 20, 4
    epochs = [
        [ShardOrder(shards, seed, window).index(200 * epoch + p) for p in range(200)]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    first = [index // 10 for index in epochs[0][:40]]
    assert all(first[start : start + 10] != [first[start]] * 10 for start in range(0, 40, 10))
    assert {index // 10 for index in epochs[0][:40]} != {index // 10 for index in epochs[1][:40]}


def test_high_words_of_the_seed_count():
    assert [ShardOrder([50], seed, 1).index(0) for seed in (1, 1 + 2**32, 1 + 2**63)] != [
        ShardOrder([50], 1, 1).index(0)
    ] * 3


def test_every_example_is_as_likely_everywhere():
    """One shard of 5 over 4,000 epochs: counts of example by place are 800 within five standard deviations of 25.3."""
    order = ShardOrder([5], 7, 1)
    counts = np.zeros((5, 5))
    for position in range(20_000):
        counts[position % 5, order.index(position)] += 1
    assert abs(counts - 800).max() < 5 * 25.3


def test_only_the_current_windows_are_held():
    order = ShardOrder([100] * 50, 0, 2)
    for position in range(0, 15_000, 37):
        order.index(position)
        assert sum(len(window) for window in order._windows.values()) <= 400
        assert len(order._epochs) <= 2
    assert len(pickle.dumps(order)) < 1000


def test_this_order_is_kept_for_good():
    """A run that goes on under a later version must see what it would have seen: numpy's frozen generator."""
    order = ShardOrder([3, 2, 4], 1234, 2)
    assert [order.index(position) for position in range(9)] == [8, 7, 6, 5, 4, 3, 1, 2, 0]
    assert [order.index(position) for position in range(9, 18)] == [3, 0, 1, 4, 2, 7, 8, 6, 5]


def test_no_examples_are_an_error():
    with pytest.raises(DataError, match="no example to draw from"):
        ShardOrder([0, 0], 0, 1)


@pytest.mark.parametrize(("shards", "seed", "window"), [([1], -1, 1), ([1], 2**64, 1), ([1], 0, 0), ([2, -1], 0, 1)])
def test_arguments_out_of_range_are_refused(shards, seed, window):
    with pytest.raises(ValueError, match="must be 1 or more"):
        ShardOrder(shards, seed, window)


def test_a_position_before_the_first_is_refused():
    with pytest.raises(IndexError, match="position -1"):
        ShardOrder([3], 0, 1).index(-1)
