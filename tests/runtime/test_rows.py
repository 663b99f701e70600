"""Which counts of rows are equal bit for bit, and which are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bksdm_runtime.rows import equal_counts

ONE: dict[str, tuple[int, ...]] = {"sample": (4, 8, 8), "timestep": (), "encoder_hidden_states": (7, 3)}


class Component:
    path = "unet/model.onnx"


class Engine:
    """Its output is its input, but where `rounds` says that a row rounds otherwise: of (count, place)."""

    component = Component()

    def __init__(self, rounds: Callable[[int, int], bool] = lambda count, place: False) -> None:
        self.rounds = rounds
        self.tried: list[int] = []

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        sample = inputs["sample"].copy()
        self.tried.append(len(sample))
        for place, row in enumerate(sample):
            if self.rounds(len(sample), place):
                row[0, 0, 0] = np.nextafter(row[0, 0, 0], np.float32(9))
        return {"out_sample": sample}


class Prepared(Engine):
    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None: ...


class Built(Engine):
    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        return shapes["sample"][0] in (2, 6)


@pytest.mark.parametrize(
    ("most", "counts"),
    [(2, (2,)), (3, (2,)), (4, (2, 4)), (8, (2, 4, 6, 8)), (16, (2, 4, 6, 8, 12, 16)), (20, (2, 4, 6, 8, 12, 16))],
)
def test_counts_are_powers_of_two_and_half_way_between(most: int, counts: tuple[int, ...]) -> None:
    assert equal_counts(Engine(), ONE, most) == counts


def test_one_that_compiles_for_each_shape_is_asked_for_powers_of_two() -> None:
    engine = Prepared()
    assert equal_counts(engine, ONE, 16) == (2, 4, 8, 16)
    assert set(engine.tried) == {2, 4, 8, 16}


def test_one_is_not_asked_for_what_it_was_not_built_for() -> None:
    engine = Built()
    assert equal_counts(engine, ONE, 16) == (2, 6)
    assert set(engine.tried) == {2, 6}


def test_one_that_was_built_for_a_single_row_shares_nothing() -> None:
    engine = Built()
    engine.holds = lambda shapes: shapes["sample"][0] == 1  # type: ignore[method-assign]
    assert equal_counts(engine, ONE, 16) == ()
    assert engine.tried == []


def test_a_single_row_is_never_evaluated() -> None:
    engine = Engine()
    assert equal_counts(engine, ONE, 1) == (2,)
    assert 1 not in engine.tried


def test_a_count_that_rounds_otherwise_in_any_place_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    last_of_six = Engine(lambda count, place: count == 6 and place == 5)
    assert equal_counts(last_of_six, ONE, 8) == (2, 4, 8)
    assert "unet/model.onnx: 6 rows" in caplog.text


def test_places_that_round_otherwise_in_two_rows_leave_nothing_to_share() -> None:
    assert equal_counts(Engine(lambda count, place: place == 1), ONE, 8) == ()


def test_where_nothing_can_be_shared_nothing_is_tried() -> None:
    engine = Engine()
    equal_counts(engine, ONE, 2)
    assert engine.tried == [2, 2]


def test_large_latents_are_tried_with_fewer_samples() -> None:
    small, large = Engine(), Engine()
    equal_counts(small, ONE, 4)
    equal_counts(large, {**ONE, "sample": (4, 64, 64)}, 4)
    assert (sum(small.tried), sum(large.tried)) == (3 * 32, 3 * 16)
