"""Which pictures a folder holds: the identity of what was trained on, or scored against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

LISTING = "metadata.jsonl"


def digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 of `folder/metadata.jsonl` and of the pictures that it names, in its order. Raises OSError."""
    total = hashlib.sha256()
    for name in (LISTING, *names):
        content = (folder / name).read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())  # so that no byte can move from one file to the next
        total.update(content)
    return total.hexdigest()
