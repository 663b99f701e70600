"""Scratch folders of dead processes go, those of living ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bksdm.leftovers import scratch

WORKING = """
import sys, time
from pathlib import Path
from bksdm.leftovers import scratch
with scratch(Path(sys.argv[1]), "x[1].partial-") as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_a_folder_and_the_next_one_sweeps_it(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    others = [tmp_path / other for other in ("x1.partial-7", "mine", "x[1]")]
    for other in others:
        other.mkdir()
    (tmp_path / "x[1].partial-note").write_text("a file")
    with scratch(tmp_path, "x[1].partial-") as folder:
        assert folder.name == f"x[1].partial-{os.getpid()}"
        assert (tmp_path / name / "half").is_file()  # alive: left alone
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with scratch(tmp_path, "x[1].partial-") as folder:
        assert list(folder.iterdir()) == []
        assert not (tmp_path / name).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x1.partial-7", "x[1]", "x[1].partial-note"]


def test_a_folder_of_the_same_number_is_not_reused(tmp_path: Path) -> None:
    (tmp_path / f".fetch-{os.getpid()}").mkdir()
    (tmp_path / f".fetch-{os.getpid()}" / "stale").write_text("from a process before")
    with scratch(tmp_path, ".fetch-") as folder:
        assert list(folder.iterdir()) == []


def test_it_goes_with_an_error_and_stays_where_it_was_renamed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch(tmp_path / "new", "x-") as folder:
        raise KeyError
    assert not folder.exists()
    with scratch(tmp_path / "new", "x-") as folder:
        folder.rename(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["whole"]
