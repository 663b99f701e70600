"""The cache of compiled graphs: one file for each graph, shape and machine, checked whole before it is used."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def user_folder() -> Path:
    """Where a user's caches go: $XDG_CACHE_HOME, or the platform's own place."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        base = Path(chosen)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "bksdm" / "compiled"


@dataclass(frozen=True)
class Entry:
    """One compiled graph: what the library exported, then the SHA-256 of it.

    OpenVINO's own cache reads a file with a flipped bit without noticing, as weights (measured, 2026.4: NaN).
    """

    path: Path

    @classmethod
    def of(cls, folder: Path, **key: str) -> Entry:
        """The entry of a key; whatever changes what is compiled belongs to the key."""
        digest = hashlib.sha256("\0".join(f"{name}={value}" for name, value in sorted(key.items())).encode())
        return cls(folder / f"{digest.hexdigest()}.blob")

    def read(self) -> NDArray[np.uint8] | None:
        """The compiled graph, mapped from the file (copied on write); None when there is none, or a damaged one."""
        try:
            content = np.memmap(self.path, dtype=np.uint8, mode="c")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: an empty file
            log.warning("the compiled graph %s cannot be read, it is compiled anew: %s", self.path, error)
            return None
        blob = content[:-_DIGEST_BYTES]
        if hashlib.sha256(blob.data).digest() != content[-_DIGEST_BYTES:].tobytes():
            log.warning("the compiled graph %s is damaged, it is compiled anew", self.path)
            return None
        return blob

    def write(self, blob: bytes | memoryview) -> None:
        """Keep it, whole or not at all; a folder that cannot be written is only a warning."""
        temporary = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(blob)
                    file.write(hashlib.sha256(blob).digest())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the compiled graph %s cannot be kept: %s", self.path, error.strerror or error)
