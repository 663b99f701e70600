"""A bundle's folder: appears whole or not at all, whatever stops the export."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bksdm_export.errors import ExportError
from bksdm_runtime.bundle import MANIFEST_NAME

log = logging.getLogger(__name__)

# What lies in the partial folder beside the target: the new bundle, the one it replaces, and a file that is locked for
# as long as the export runs. A process's id would not do: in a container every export has the same one, and on a shared
# file system another host's means nothing here.
_NEW, _OLD, _LOCK = "bundle", "old", "lock"


def resolve(target: Path) -> Path:
    """The place that a target means, absolute. Through links: they stay, and what they name is written or replaced.

    Raises ExportError where there is no current folder.
    """
    try:
        return Path(os.path.realpath(target))
    except OSError as error:
        raise ExportError(f"cannot write to {target}: {error.strerror}: choose another --output") from error


def check_target(target: Path, *, force: bool, marker: str = MANIFEST_NAME) -> None:
    """Refuse a target that must not be replaced, and clear away what killed exports to it left. Raises ExportError.

    marker: a file that every folder of the kind that is written here has; one without it is never replaced.
    """
    target = resolve(target)
    try:
        _clear_leftovers(target)
        _refuse(target, force=force, marker=marker)
    except OSError as error:  # a name too long, a parent that is closed, or a file, or that was deleted
        raise ExportError(f"cannot write to {target}: {error.strerror}: choose another --output") from error


def check_space(folder: Path, expected: int) -> None:
    """Refuse a folder whose disk has less room than the expected bytes. Raises ExportError."""
    free = shutil.disk_usage(folder).free
    if free < expected:
        raise ExportError(
            f"the bundle takes about {expected / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: "
            "make room, or choose another --output"
        )


@contextmanager
def whole_or_nothing(target: Path, *, force: bool = False, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """Give an empty folder on the target's disk, which takes its place when the block ends well.

    Otherwise it is removed; what a killed export left is removed by the next one to the same target. Of an old bundle
    every file stays in place until the new one is whole. marker: see check_target. Raises ExportError, also for an
    OSError of the block.
    """
    check_target(target, force=force, marker=marker)
    target = resolve(target)
    with _partial_folder(target) as partial:
        try:
            (partial / _NEW).mkdir()
            yield partial / _NEW
            _refuse(target, force=force, marker=marker)  # again: minutes have passed
            if target.exists():  # no rename replaces a folder that is not empty
                target.rename(partial / _OLD)
            (partial / _NEW).rename(target)
        except OSError as error:
            raise ExportError(f"{target} is not written: {_reason(error, target.parent)}") from error


def _refuse(target: Path, *, force: bool, marker: str) -> None:
    try:
        target.stat()
    except FileNotFoundError:
        return
    if not target.is_dir():
        raise ExportError(f"{target} is a file: choose another --output")
    if os.path.ismount(target):
        raise ExportError(f"{target} is a mount point, which no folder replaces: choose a folder in it as --output")
    if any(target.iterdir()):
        if not (target / marker).is_file():
            kind = "bundle" if marker == MANIFEST_NAME else "model repository"
            raise ExportError(f"{target} holds something that is not a {kind}: choose another --output")
        if not force:
            raise ExportError(f"{target} exists: choose another --output, or replace it with --force")
    if Path.cwd().is_relative_to(target):
        raise ExportError(f"{target} is the folder you are in, which would be gone from under you: go out of it first")
    if not os.access(target, os.W_OK):
        raise ExportError(f"{target} is read-only: choose another --output")


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, locked; gone when the block ends, with what had to be made to hold it."""
    missing: list[Path] = []
    try:
        try:
            missing = [folder for folder in target.parents if not folder.exists()]  # deepest first
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        except OSError as error:
            raise ExportError(f"cannot write to {target.parent}: {error.strerror}: choose another --output") from error
        lock = _hold(partial)
        try:
            yield partial
        finally:
            _clear(partial, target)
            if lock is not None:
                os.close(lock)
    finally:
        for folder in missing:
            with suppress(OSError):  # not empty: the bundle lies in it
                folder.rmdir()


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _clear(partial: Path, target: Path) -> None:
    """Remove a partial folder, or warn. An old bundle in it goes back to its place where no new one took it."""
    old = partial / _OLD
    try:
        if old.exists() and not target.exists():
            old.rename(target)
        for name in (_NEW, _OLD):
            if (partial / name).exists():
                shutil.rmtree(partial / name)
        shutil.rmtree(partial)  # the lock last: without it no later export would know that this one is over
    except OSError as error:
        log.warning("%s could not be removed (%s): delete it", partial, error.strerror or error)


def _clear_leftovers(target: Path) -> None:
    """Remove the partial folders of exports that are over: those whose lock can be taken."""
    pattern = re.compile(re.escape(_prefix(target)) + r"\w+")
    try:
        partials = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # nothing there, or not to be looked at
        return
    for partial in partials:
        lock = _take(partial / _LOCK)
        if lock is not None:
            try:
                _clear(partial, target)
            finally:
                os.close(lock)


def _hold(partial: Path) -> int | None:
    """Lock a new partial folder: the lock's descriptor, or None where files cannot be locked."""
    new = partial / f"{_LOCK}.new"  # no other export sees the lock before it is held
    lock = _take(new, os.O_CREAT)
    if lock is not None:
        new.rename(partial / _LOCK)
    return lock


def _take(path: Path, flags: int = 0) -> int | None:
    """Lock a file until its descriptor is closed, by a death too; None where that cannot be done now."""
    if sys.platform == "win32":
        return None  # leftovers stay: they cannot be told from an export that runs
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | flags)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another's, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _reason(error: OSError, folder: Path) -> str:
    """What went wrong, and where: a full disk's error does not say which."""
    if error.errno == errno.ENOSPC:
        places = sorted({folder, Path(tempfile.gettempdir())})
        with suppress(OSError):
            free = ", ".join(f"{shutil.disk_usage(place).free / 1e9:.2f} GB in {place}" for place in places)
            return f"a disk is full (free: {free})"
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
