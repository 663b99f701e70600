"""What was compiled is used again, and never in place of what would be compiled now."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bksdm_runtime import bundle as bundles
from bksdm_runtime import cli
from bksdm_runtime.compiled_cache import Entry, user_folder
from bksdm_runtime.engine import EngineError, EngineSettings, open_engine


def test_an_entry_comes_back_and_its_key_is_all_of_its_facts(tmp_path: Path) -> None:
    entry = Entry.of(tmp_path / "new" / "folder", bundle="b", shapes="s")
    assert entry.read() is None
    entry.write(b"compiled")
    found = entry.read()
    assert found is not None
    assert found.tobytes() == b"compiled"
    assert [path.name for path in entry.path.parent.iterdir()] == [entry.path.name]  # no part is left
    others = (Entry.of(entry.path.parent, bundle="b", shapes="t"), Entry.of(entry.path.parent, bundle="bs", shapes=""))
    assert {other.path for other in others}.isdisjoint({entry.path})


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 100, "cut", "flip", "folder"])
def test_a_damaged_entry_is_nothing_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    entry = Entry.of(tmp_path, bundle="b")
    entry.write(bytes(range(256)) * 10)
    whole = entry.path.read_bytes()
    entry.path.unlink()
    if damage == "folder":
        entry.path.mkdir()
    else:
        changed = {"cut": whole[:-1], "flip": whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]}
        entry.path.write_bytes(changed.get(damage, damage))
    assert entry.read() is None
    [message] = caplog.messages
    assert message.startswith(f"the compiled graph {entry.path} ")
    assert "compiled anew" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    Entry.of(tmp_path, bundle="b").write(b"x")
    assert caplog.messages[0].endswith("cannot be kept: Permission denied")


def test_a_folder_that_is_a_file_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    entry = Entry.of(tmp_path / "file", bundle="b")
    entry.write(b"x")
    assert "cannot be kept: " in caplog.messages[0]
    assert entry.read() is None


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert user_folder() == Path("/caches/bksdm/compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/ann"))
    for platform, folder in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr("sys.platform", platform)
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        assert user_folder() == Path("/home/ann") / folder / "bksdm" / "compiled"


@pytest.fixture
def cached(tmp_path: Path) -> EngineSettings:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'bksdm[openvino]'")
    return EngineSettings("openvino", threads=1, arithmetic="f32", compiled_cache=tmp_path / "cache")


def decode(folder: Path, settings: EngineSettings, batch: int = 1) -> np.ndarray:
    """The toy's decoder, opened anew."""
    latents = np.random.default_rng(0).standard_normal((batch, 4, 8, 8)).astype(np.float32)
    return open_engine(bundles.load(folder), "vae_decoder", settings)({"latent_sample": latents})["sample"]


def test_a_hit_neither_reads_nor_compiles_the_graph(
    toy_bundle: Path, cached: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bksdm_runtime.backends import ov

    first = decode(toy_bundle, cached)
    np.testing.assert_array_equal(first, decode(toy_bundle, replace(cached, compiled_cache=None)))
    monkeypatch.setattr(ov, "_read", None)
    np.testing.assert_array_equal(first, decode(toy_bundle, cached))
    with pytest.raises(EngineError):  # another shape is not there
        decode(toy_bundle, cached, batch=2)


def test_the_key_tells_apart_whatever_is_compiled(
    toy_bundle: Path, make_toy_bundle: Callable[..., Path], cached: EngineSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    decode(toy_bundle, cached)
    decode(toy_bundle, cached)
    assert len(list(folder.iterdir())) == 1
    decode(toy_bundle, cached, batch=2)
    decode(toy_bundle, replace(cached, pinning=True))
    decode(make_toy_bundle(tmp_path / "half", dtype="float16"), cached)
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flip", "foreign"])
def test_a_damaged_entry_is_compiled_anew_and_replaced(
    toy_bundle: Path, cached: EngineSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = decode(toy_bundle, cached)
    [path] = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage == "flip":
        path.write_bytes(whole[:-200] + bytes([whole[-200] ^ 0x40]) + whole[-199:])
    else:  # sound by its digest, but nothing that the library exported
        Entry(path).write(b"something else" * 100)
    np.testing.assert_array_equal(first, decode(toy_bundle, cached))
    assert "compiled anew" in caplog.messages[0]
    caplog.clear()
    np.testing.assert_array_equal(first, decode(toy_bundle, cached))
    assert caplog.messages == []


def test_it_is_off_unless_asked_for(
    toy_bundle: Path, cached: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    flags = ["a", "--bundle", str(toy_bundle), "--backend", "openvino", "--steps", "1", "--threads", "1"]
    assert cli.run(flags) == 0
    assert not (tmp_path / "user").exists()
    assert cli.run([*flags, "--compiled-cache"]) == 0
    assert len(list((tmp_path / "user" / "bksdm" / "compiled").iterdir())) == 3  # text encoder, U-Net, decoder
