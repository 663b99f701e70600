"""Picture files to score: which there are, and their pixels, read ahead in threads so that a network need not wait."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NAMED = 3  # of many files, in an error

T = TypeVar("T")


class PicturesError(Exception):
    """Pictures that cannot be scored; the message is one sentence that counts and names them."""


def collect(folders: Sequence[Path]) -> dict[str, Path]:
    """Picture files by their name without suffix, sorted; folders and all that is hidden are passed over.

    Of several folders, which are shards of one job, a name may come twice with the same bytes. Raises PicturesError
    where the bytes differ, where two files of a folder have one name, and where there is nothing.
    """
    found: dict[str, Path] = {}
    twice: list[str] = []
    for folder in folders:
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        except OSError as error:
            raise PicturesError(f"{folder} cannot be read: {error.strerror or error}") from None
        for path in paths:
            if path.name.startswith(".") or path.is_dir():
                continue
            other = found.setdefault(path.stem, path)
            if other != path and (other.parent == path.parent or other.read_bytes() != path.read_bytes()):
                twice.append(f"{other} and {path}")
    if twice:
        raise PicturesError(f"{_counted(len(twice), 'name')} of two pictures: {_shown(twice)}")
    if not found:
        raise PicturesError(f"there is no picture in {', '.join(map(str, folders))} ({', '.join(SUFFIXES)})")
    return dict(sorted(found.items()))


@dataclass
class Reader(Generic[T]):
    """Pictures as `prepare` makes them, of their name and themselves, in the order of their files; some are ahead.

    broken: what could not be read or prepared so far, "name: why". threads: that decode and prepare.
    """

    files: Mapping[str, Path]
    prepare: Callable[[str, Image.Image], T]
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    ahead: int = 64
    broken: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        waiting: deque[tuple[str, Future[T]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for name, path in self.files.items():
                    waiting.append((name, pool.submit(self._read, name, path)))
                    if len(waiting) > self.ahead:
                        yield from self._next(waiting)
                while waiting:
                    yield from self._next(waiting)
            finally:
                for _, future in waiting:
                    future.cancel()

    def _read(self, name: str, path: Path) -> T:
        with Image.open(path) as picture:
            picture.load()
            return self.prepare(name, picture)

    def _next(self, waiting: deque[tuple[str, Future[T]]]) -> Iterator[tuple[str, T]]:
        name, future = waiting.popleft()
        try:
            yield name, future.result()
        except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ValueError
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.broken.append(f"{name}: {reason:.100}")

    def refuse_broken(self) -> None:
        """Raises PicturesError where anything could not be read."""
        if self.broken:
            raise PicturesError(f"{_counted(len(self.broken), 'picture')} cannot be scored: {_shown(self.broken)}")


def refuse_missing(names: Sequence[str], files: Mapping[str, Path], what: str) -> None:
    """Refuse names without a picture. Raises PicturesError: how many, and the first."""
    if missing := [name for name in names if name not in files]:
        raise PicturesError(f"{_counted(len(missing), what)} without a picture: {_shown(missing)}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + ", ..." * (len(names) > _NAMED)
