"""Archives by package name: from the cache, through a client that stands in for pip and npm, and what can go wrong."""

import hashlib
import subprocess

import pytest

from bksdm import packages
from bksdm.packages import PACKAGES, Package, PackageError, fetch

CONTENT = b"archive"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["pypi", "npm"])
def row(request, tmp_path, monkeypatch):
    package = Package(request.param, "thing", "1.0", "thing-1.0.tgz", DIGEST, "MIT")
    monkeypatch.setitem(PACKAGES, "thing", package)
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    return package


def _client(monkeypatch, content, code=0, stderr=""):
    calls = []

    def run(command, cwd, **_):
        calls.append(command)
        if content is not None:
            (cwd / "thing-1.0.tgz").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_an_archive_is_fetched_once_and_then_read_from_the_cache(row, monkeypatch, tmp_path):
    calls = _client(monkeypatch, CONTENT)
    assert fetch("thing").read_bytes() == CONTENT
    assert fetch("thing") == tmp_path / "cache" / "packages" / row.file
    assert len(calls) == 1


@pytest.mark.usefixtures("row")
def test_a_damaged_cache_is_fetched_again(monkeypatch):
    _client(monkeypatch, CONTENT)
    fetch("thing").write_bytes(b"cut")
    assert fetch("thing").read_bytes() == CONTENT


@pytest.mark.usefixtures("row")
def test_another_file_than_the_tested_one_is_refused_and_not_kept(monkeypatch, tmp_path):
    _client(monkeypatch, b"other")
    with pytest.raises(PackageError, match="not the one this version was tested with"):
        fetch("thing")
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


@pytest.mark.usefixtures("row")
def test_what_a_killed_fetch_left_is_swept(monkeypatch, tmp_path):
    _client(monkeypatch, CONTENT)
    left = tmp_path / "cache" / "packages" / ".fetch-1"
    left.mkdir(parents=True)
    (left / "half.tgz").write_bytes(b"half")
    fetch("thing")
    assert [path.name for path in left.parent.iterdir()] == ["thing-1.0.tgz"]


@pytest.mark.usefixtures("row")
def test_a_failing_client_is_quoted(monkeypatch):
    _client(monkeypatch, None, code=1, stderr="warning\nno network\n")
    with pytest.raises(PackageError, match="no network"):
        fetch("thing")


@pytest.mark.usefixtures("row")
def test_a_client_that_leaves_nothing_is_told(monkeypatch):
    _client(monkeypatch, None)
    with pytest.raises(PackageError, match=r"expected thing-1.0.tgz"):
        fetch("thing")


def test_no_npm_says_what_to_install(row, monkeypatch):
    if row.registry != "npm":
        pytest.skip("pip is part of this Python")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match=r"install Node\.js"):
        fetch("thing")
