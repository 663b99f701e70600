from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field

import pytest
from PIL import Image

from bksdm_training.data import DataError
from bksdm_training.sources import BrokenExample, Example, Skip, Skips, read_or_next


@dataclass
class Numbers:
    """A source whose examples at `broken` are so."""

    count: int
    broken: frozenset[int]
    name: str = "numbers"
    window: int = 1
    identity: str = ""
    licence: str | None = None
    lost: Skips = field(default_factory=Skips)

    @property
    def shards(self) -> tuple[int, ...]:
        return (self.count,)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Example:
        if index in self.broken:
            raise BrokenExample(str(index), "empty caption")
        return Example(str(index), Image.new("RGB", (1, 1)), (f"number {index}",))


def test_a_broken_example_is_replaced_by_the_next_whole_one():
    source = Numbers(10, frozenset({3, 4, 9, 0}))
    example, skips = read_or_next(source, 3)
    assert (example.key, [skip.key for skip in skips]) == ("5", ["3", "4"])
    example, skips = read_or_next(source, 9)
    assert (example.key, [skip.key for skip in skips]) == ("1", ["9", "0"])
    assert read_or_next(source, 7)[1] == []


def test_a_hundred_broken_ones_in_a_row_end_it():
    assert read_or_next(Numbers(1000, frozenset(range(99))), 0)[0].key == "99"
    with pytest.raises(
        DataError, match=r"100 examples in a row of numbers cannot be used, '0' \(empty caption\), .*mend"
    ):
        read_or_next(Numbers(1000, frozenset(range(100))), 0)


def test_all_broken_ends_it():
    with pytest.raises(DataError, match="3 examples in a row"):
        read_or_next(Numbers(3, frozenset(range(3))), 1)


def test_counts_of_workers_add_up():
    one, other = Skips(), Skips()
    one.add([Skip("a", "empty caption"), Skip("b", "missing file")])
    one.add()
    other.add([Skip(str(n), "empty caption") for n in range(7)])
    one.merge(pickle.loads(pickle.dumps(other)))
    assert (one.seen, one.skipped, one.share()) == (12, 9, 0.75)
    assert one.reasons == Counter({"empty caption": 8, "missing file": 1})
    assert [skip.key for skip in one.first] == ["a", "b", "0", "1", "2"]
    assert Skips().share() == 0


def test_past_the_limit_the_reasons_and_the_first_are_named():
    skips = Skips()
    skips.add([Skip("a\n", "empty caption"), *[Skip(f"{n}", "undecodable image", "cut") for n in range(8)]], used=91)
    skips.check(0.09)
    with pytest.raises(DataError) as raised:
        skips.check(0.08)
    assert str(raised.value) == (
        "9 of 100 examples could not be used, more than 8.00% (8 undecodable image, 1 empty caption); the first: "
        "'a\\n' (empty caption), '0' (undecodable image: cut), '1' (undecodable image: cut), "
        "'2' (undecodable image: cut), '3' (undecodable image: cut): mend the data, or allow a larger share"
    )


def test_one_broken_example_at_the_beginning_is_no_share_yet():
    skips = Skips()
    skips.add([Skip("a", "empty caption")])
    skips.check(0.01)
    with pytest.raises(DataError, match="1 of 2 examples"):
        skips.check(0)


def test_a_broken_example_survives_pickling():
    error = pickle.loads(pickle.dumps(BrokenExample("a", "undecodable image", OSError("cut\nshort"))))
    assert (error.skip, str(error)) == (Skip("a", "undecodable image", "cut"), "'a' (undecodable image: cut)")
