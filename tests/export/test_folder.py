"""A bundle's folder appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bksdm_export.errors import ExportError
from bksdm_export.folder import check_space, check_target, resolve, whole_or_nothing

REPOSITORY = Path(__file__).parents[2]

HALF_WAY = """
import sys, time
from pathlib import Path
from bksdm_export.folder import whole_or_nothing
with whole_or_nothing(Path(sys.argv[1]), force=True) as folder:
    (folder / "half").write_text("written")
    print("half way", flush=True)
    time.sleep(60)
"""


def write(target: Path, content: str, *, force: bool = False) -> None:
    with whole_or_nothing(target, force=force) as folder:
        (folder / "bundle.json").write_text(content)


@contextmanager
def half_way(target: Path) -> Iterator[None]:
    """While it lasts, an export in another process is in the middle of its writing. In the end it is killed."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("export", "runtime", "."))
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, str(target)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        yield
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def killed_half_way(target: Path) -> None:
    with half_way(target):
        pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with whole_or_nothing(target) as folder:
        (folder / "bundle.json").write_text("new")
        assert not target.exists()
        assert folder.is_relative_to(target.parent)
    assert names(target) == ["bundle.json"]
    assert (target / "bundle.json").read_text() == "new"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_or_nothing(tmp_path / "made" / "for it" / "bundle") as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_an_error_leaves_the_old_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(KeyError), whole_or_nothing(tmp_path / "bundle", force=True):
        raise KeyError
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_a_killed_export_leaves_no_bundle_and_the_next_removes_its_remains(tmp_path: Path) -> None:
    killed_half_way(tmp_path / "bundle")
    [left] = names(tmp_path)
    assert left.startswith(".bundle.partial-")
    write(tmp_path / "bundle", "new")
    assert names(tmp_path) == ["bundle"]


def test_a_killed_export_leaves_the_old_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    killed_half_way(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "old"


def test_a_kill_between_the_two_renames_loses_no_bundle(tmp_path: Path) -> None:
    killed_half_way(tmp_path / "bundle")
    [left] = tmp_path.iterdir()
    (left / "old").mkdir()
    (left / "old" / "bundle.json").write_text("old")
    with pytest.raises(ExportError, match="replace it with --force"):
        write(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_an_interrupt_between_the_two_renames_loses_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bundle", "old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "bundle" and path.parent != tmp_path:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "bundle", "new", force=True)
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_the_remains_of_a_running_export_are_left_alone(tmp_path: Path) -> None:
    with half_way(tmp_path / "bundle"):
        [running] = tmp_path.iterdir()
        write(tmp_path / "bundle", "new")
        assert (running / "bundle" / "half").is_file()
    write(tmp_path / "bundle", "newer", force=True)
    assert names(tmp_path) == ["bundle"]


def test_exports_to_one_target_leave_each_other_alone(tmp_path: Path) -> None:
    """Even with one process id: it does not tell whose a folder is."""
    with whole_or_nothing(tmp_path / "bundle", force=True) as first:
        (first / "bundle.json").write_text("first")
        write(tmp_path / "bundle", "second")
        assert first.is_dir()
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "first"
    assert names(tmp_path) == ["bundle"]


def test_a_folder_of_another_making_is_left_alone(tmp_path: Path) -> None:
    """A run of digits too long for a process id was an OverflowError."""
    others = [".bundle.partial-99999999999999999999-abc", ".bundle.partial-unlocked"]
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "bundle", "new")
    assert names(tmp_path) == [*others, "bundle"]


def test_where_files_cannot_be_locked_remains_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_half_way(tmp_path / "bundle")
    [left] = names(tmp_path)

    def unlocked(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    write(tmp_path / "bundle", "new")
    assert names(tmp_path) == [left, "bundle"]


def test_an_old_bundle_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "bundle", "old")
    rmtree = shutil.rmtree

    def busy(path: Path) -> None:
        if path.name == "old":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmtree(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        write(tmp_path / "bundle", "new", force=True)
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "new"
    [message] = caplog.messages
    assert "could not be removed (Device or resource busy): delete it" in message
    write(tmp_path / "bundle", "newer", force=True)
    assert names(tmp_path) == ["bundle"]


def test_force_replaces_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    write(tmp_path / "bundle", "new", force=True)
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


def test_a_bundle_is_not_replaced_without_force(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(ExportError, match="exists: choose another --output, or replace it with --force"):
        check_target(tmp_path / "bundle", force=False)


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"")
    with pytest.raises(ExportError, match="is not a bundle"):
        check_target(tmp_path / "photos", force=True)
    with pytest.raises(ExportError, match="is a file"):
        check_target(tmp_path / "photos" / "me.png", force=True)
    with pytest.raises(ExportError, match="/ is a mount point"):
        check_target(Path("/"), force=True)
    check_target(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")
    assert (tmp_path / "empty" / "bundle.json").read_text() == "new"


def test_what_appeared_meanwhile_is_not_replaced_either(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.png").write_bytes(b"")
    with pytest.raises(ExportError, match="exists: "), whole_or_nothing(tmp_path / "bundle"):
        write(tmp_path / "bundle", "another's")
    with pytest.raises(ExportError, match="is not a bundle"), whole_or_nothing(tmp_path / "b", force=True):
        shutil.copytree(photos, tmp_path / "b")
    assert names(tmp_path) == ["b", "bundle", "photos"]
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "another's"


def test_the_folder_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "unet").mkdir()
    monkeypatch.chdir(tmp_path / "bundle" / "unet")
    for target in (".", ".."):
        with pytest.raises(ExportError, match="is the folder you are in"):
            check_target(Path(target), force=True)
    assert resolve(Path("..")).name == "bundle"


def test_of_a_link_the_bundle_it_names_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "small", "old")
    (tmp_path / "current").symlink_to("disk/small")
    with pytest.raises(ExportError, match=r"disk/small exists: .* replace it with --force"):
        write(tmp_path / "current", "new")
    write(tmp_path / "current", "new", force=True)
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "disk" / "small" / "bundle.json").read_text() == "new"
    assert (names(tmp_path), names(tmp_path / "disk")) == (["current", "disk"], ["small"])


def test_through_a_link_to_nothing_the_bundle_is_written(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("disk/small")
    write(tmp_path / "current", "new")
    assert (tmp_path / "disk" / "small" / "bundle.json").read_text() == "new"
    assert (tmp_path / "current" / "bundle.json").read_text() == "new"


def test_a_target_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for target, reason in (
        (tmp_path / "file" / "bundle", "Not a directory"),
        (tmp_path / ("long" * 64), "File name too long"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "loop" / "bundle", "symbolic links"),
    ):
        with pytest.raises(ExportError, match=rf"cannot write to .*: .*{reason}.*: choose another --output"):
            check_target(target, force=True)
    with pytest.raises(ExportError, match=r"cannot write to .*: File name too long"):  # of the partial folder, here
        write(tmp_path / ("long" * 62), "new")
    assert names(tmp_path) == ["file", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="to root no folder is closed")
def test_a_closed_parent_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "closed" / "bundle", "old")
    try:
        for mode in (0o000, 0o600, 0o500):
            (tmp_path / "closed").chmod(mode)
            with pytest.raises(ExportError, match=r"cannot write to .*: Permission denied"):
                write(tmp_path / "closed" / "new", "new")
    finally:
        (tmp_path / "closed").chmod(0o700)
    (tmp_path / "closed" / "bundle").chmod(0o500)
    with pytest.raises(ExportError, match="bundle is read-only"):
        check_target(tmp_path / "closed" / "bundle", force=True)
    (tmp_path / "closed" / "bundle").chmod(0o700)


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e9, 98e9, 2_000_000_000))
    check_space(tmp_path, 2_000_000_000)
    with pytest.raises(ExportError, match=r"takes about 3\.25 GB, and .* has 2\.00 GB free"):
        check_space(tmp_path, 3_250_000_000)


def test_an_error_of_another_place_is_not_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /tmp was "cannot write" the target."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0 if path.name == "tmp" else 7e9))
    full = rf"bundle is not written: a disk is full \(free: 7\.00 GB in {tmp_path}, 0\.00 GB in {tmp_path}/tmp\)"
    with pytest.raises(ExportError, match=full), whole_or_nothing(tmp_path / "bundle"):
        raise OSError(errno.ENOSPC, "No space left on device")
    lost = rf"bundle is not written: No such file or directory \({tmp_path}/lost\)"
    with pytest.raises(ExportError, match=lost), whole_or_nothing(tmp_path / "bundle"):
        (tmp_path / "lost").read_text()
    assert names(tmp_path) == []


def test_two_exports_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with whole_or_nothing(tmp_path / "a") as a, whole_or_nothing(tmp_path / "b") as b:
        assert a != b
    assert names(tmp_path) == ["a", "b"]
