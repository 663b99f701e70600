"""A bundle's folder appears whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bksdm_export.errors import ExportError
from bksdm_export.folder import check_target, whole_or_nothing

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


def killed_half_way(target: Path) -> None:
    """Run an export in another process and kill it in the middle of its writing."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("export", "runtime", "."))
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, str(target)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with whole_or_nothing(target) as folder:
        (folder / "bundle.json").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "bundle.json").read_text() == "new"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_or_nothing(tmp_path / "bundle") as folder:
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
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = tmp_path / f".bundle.partial-{dead.pid}-abc.old"
    old.mkdir()
    (old / "bundle.json").write_text("old")
    with pytest.raises(ExportError, match="replace it with --force"):
        write(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_the_remains_of_a_running_export_are_left_alone(tmp_path: Path) -> None:
    running = tmp_path / f".bundle.partial-{os.getppid()}-abc"
    running.mkdir()
    write(tmp_path / "bundle", "new")
    assert running.is_dir()


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
    check_target(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")
    assert (tmp_path / "empty" / "bundle.json").read_text() == "new"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write to"):
        write(tmp_path / "file" / "bundle", "new")


def test_two_exports_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with whole_or_nothing(tmp_path / "a") as a, whole_or_nothing(tmp_path / "b") as b:
        assert a != b
        time.sleep(0)
    assert names(tmp_path) == ["a", "b"]
