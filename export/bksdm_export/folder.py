"""A bundle's folder: appears whole or not at all, whatever stops the export."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bksdm_export.errors import ExportError
from bksdm_runtime.bundle import MANIFEST_NAME


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that must not be replaced, and clear away what killed exports to it left. Raises ExportError."""
    if target.absolute().parent.is_dir():
        _remove_leftovers(target.absolute())
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target} is a file: choose another --output")
    if any(target.iterdir()):
        if not (target / MANIFEST_NAME).is_file():
            raise ExportError(f"{target} holds something that is not a bundle: choose another --output")
        if not force:
            raise ExportError(f"{target} exists: choose another --output, or replace it with --force")


@contextmanager
def whole_or_nothing(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder beside the target, which takes its place when the block ends well.

    Otherwise it is removed; what a killed export left is removed by the next one to the same target. Of an old bundle
    every file stays in place until the new one is whole. Raises ExportError.
    """
    target = target.absolute()
    check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are closed to everyone else
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield partial
        if target.exists():  # no rename replaces a folder that is not empty
            replaced = partial.with_name(partial.name + ".old")
            target.rename(replaced)
            try:
                partial.rename(target)
            except OSError:
                replaced.rename(target)
                raise
            shutil.rmtree(replaced)
        else:
            partial.rename(target)
    except OSError as error:  # a full disk, most of all
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prefix(target: Path) -> str:
    # The process's id tells a later export whether this one still runs.
    return f".{target.name}.partial-{os.getpid()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove partial folders of processes that no longer run."""
    pattern = re.compile(re.escape(f".{target.name}.partial-") + r"(\d+)-\w+(\.old)?")
    for path in target.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and not _runs(int(found[1])):
            if found[2] and not target.exists():
                path.rename(target)  # killed between the two renames: the old bundle comes back
            else:
                shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
