"""A bar on stderr for what takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[float], object]]:
    """Of `total` pictures; yields what is to be told how many more are done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="picture", dynamic_ncols=True, disable=None) as shown:
        yield shown.update
