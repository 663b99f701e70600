"""What could not be used: one broken example, the count of them, and the whole one that stands in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bksdm_training.data import DataError

if TYPE_CHECKING:
    from bksdm_training.sources.source import Example, Source

SHOWN = 5  # examples that an error names
IN_A_ROW = 100  # so many broken ones together are a broken data set, a lost disk among the causes
LEAST_SEEN = 100  # a share of fewer says nothing: one broken picture among the first ten is no 10 %


@dataclass(frozen=True)
class Skip:
    """key: of the example, or a tar's name. reason: one of few, to be counted by. detail: what was found, or empty."""

    key: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        found = f": {self.detail}" if self.detail else ""
        return f"{self.key!r} ({self.reason}{found})"  # quoted: keys come with the data and may hold control characters


class BrokenExample(Exception):  # noqa: N818 - not every one ends in an error: it is what gets skipped
    """One example cannot be used; `skip` says which and why."""

    def __init__(self, key: str, reason: str, detail: object = "") -> None:
        super().__init__(key, reason, detail)  # what pickling hands to __init__ again
        self.skip = Skip(key, reason, (str(detail).splitlines() or [""])[0][:200])

    def __str__(self) -> str:
        return str(self.skip)


@dataclass
class Skips:
    """Counts of one process or worker. seen: examples tried; reasons: skipped ones by reason; first: a few of them."""

    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[Skip] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """How many could not be used."""
        return sum(self.reasons.values())

    def add(self, skips: Iterable[Skip] = (), *, used: int = 1) -> None:
        """Count `used` whole examples, and the skips on the way to them."""
        self.seen += used
        for skip in skips:
            self.seen += 1
            self.reasons[skip.reason] += 1
            if len(self.first) < SHOWN:
                self.first.append(skip)

    def merge(self, other: Skips) -> None:
        """Add the counts of another worker or process."""
        self.seen += other.seen
        self.reasons.update(other.reasons)
        self.first = [*self.first, *other.first][:SHOWN]

    def share(self) -> float:
        """Skipped per seen, 0 to 1; 0 before any was seen."""
        return self.skipped / self.seen if self.seen else 0.0

    def check(self, limit: float) -> None:
        """Raise DataError when more than `limit` (0 to 1) of the examples could not be used.

        The share is taken of at least a hundred examples; with a limit of 0 the first skip ends it."""
        if self.skipped > limit * max(self.seen, LEAST_SEEN):
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"{self.skipped} of {self.seen} examples could not be used, more than {limit:.2%} ({counts}); "
                f"the first: {', '.join(map(str, self.first))}: mend the data, or allow a larger share"
            )


def read_or_next(source: Source, index: int) -> tuple[Example, list[Skip]]:
    """The example at `index`, or the next whole one after it, past the end from the start again; and what was skipped.

    It depends on the data alone, so every process takes the same. Raises DataError after a hundred broken ones
    in a row, or when all are broken."""
    skips: list[Skip] = []
    tries = min(IN_A_ROW, len(source))
    for step in range(tries):
        try:
            return source.read((index + step) % len(source)), skips
        except BrokenExample as broken:
            skips.append(broken.skip)
    shown = ", ".join(map(str, skips[:SHOWN]))
    raise DataError(f"{tries} examples in a row of {source.name} cannot be used, {shown} and so on: mend the data")
