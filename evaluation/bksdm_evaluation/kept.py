"""Arrays that are dear to compute, kept in a folder under the hash of all that decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm import leftovers


def kept(folder: Path | None, key: Mapping[str, object], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array of `key` from `folder`, or what `make` gives, which is then kept there; without a folder, just made.

    key: anything JSON takes; it lies beside the array as .json. Written whole or not at all; a damaged array is made
    anew. Raises OSError when the folder cannot be written."""
    if folder is None:
        return make()
    text = json.dumps(key, sort_keys=True, indent=2)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        array = make()
    with leftovers.scratch(folder, ".keep-") as scratch:
        np.save(scratch / "array.npy", array, allow_pickle=False)
        (scratch / "key.json").write_text(text + "\n")
        (scratch / "key.json").replace(path.with_suffix(".json"))
        (scratch / "array.npy").replace(path)
    return array
