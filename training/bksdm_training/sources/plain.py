"""A plain folder of pictures that share one caption: what DreamBooth learns a subject from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from bksdm_training.data import DataError
from bksdm_training.sources import picture
from bksdm_training.sources.skips import BrokenExample, Skips
from bksdm_training.sources.source import Example, check_index, licence_of, name_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of picture.FORMATS


@dataclass(frozen=True)
class PlainFolder:
    """A Source. names: of the pictures, sorted; caption: of every one of them."""

    folder: Path
    names: tuple[str, ...]
    caption: str
    licence: str | None
    lost: Skips = field(default_factory=Skips)
    window: int = 1

    @property
    def name(self) -> str:
        """The folder's name."""
        return name_of(self.folder)

    @property
    def shards(self) -> tuple[int, ...]:
        """All in one."""
        return (len(self),)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def identity(self) -> str:
        """SHA-256 of the caption, and of names and sizes."""
        total = hashlib.sha256(f"{self.caption}\0".encode())
        for name in self.names:
            path = self.folder / name
            total.update(f"{name}\0{path.stat().st_size if path.is_file() else -1}\0".encode())
        return total.hexdigest()

    def read(self, index: int) -> Example:
        """Raises BrokenExample, IndexError."""
        check_index(index, len(self))
        name = self.names[index]
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            raise BrokenExample(name, "unreadable file", error.strerror or error) from None
        return Example(name, picture.decode(name, content), (self.caption,))


def open_plain(folder: Path, caption: str) -> PlainFolder:
    """The pictures that lie in `folder` itself, by their names' ends; a listing there is not read. Raises DataError."""
    if not caption.strip():
        raise DataError(f"the pictures of {folder} need a prompt that says what they show, and it is empty")
    try:
        files = [path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror or error}): give a folder of pictures") from error
    names = sorted(name for name in files if not name.startswith("."))  # macOS puts a "._a.jpg" beside each "a.jpg"
    if not names:
        raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}): put them there, without subfolders")
    return PlainFolder(folder, tuple(names), caption.strip(), licence_of(folder))
