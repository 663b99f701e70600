"""Mapped files are given back, and nothing of what they hold is lost."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bksdm_runtime import bundle as bundles
from bksdm_runtime import mapped
from bksdm_runtime.engine import EngineSettings, open_engine
from bksdm_runtime.mapped import release

BYTES = 8 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")


def resident(path: Path) -> int:
    """Bytes of a file that this process has in memory by mappings of it."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@linux
def test_pages_of_a_folder_are_given_back_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "a bundle"
    folder.mkdir()
    path, other = folder / "model.onnx_data", tmp_path / "a bundle beside it"
    for one in (path, other):
        one.write_bytes(bytes(range(256)) * (BYTES // 256))
    with path.open("rb") as file, other.open("rb") as beside:
        ours = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        theirs = mmap.mmap(beside.fileno(), 0, access=mmap.ACCESS_READ)
        before = sum(ours[::4096]), sum(theirs[::4096])
        assert resident(path) == resident(other) == BYTES
        assert release(folder) == BYTES
        assert (resident(path), resident(other)) == (0, BYTES)
        assert (sum(ours[::4096]), sum(theirs[::4096])) == before
        ours.close()
        theirs.close()


@linux
def test_what_was_written_to_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx_data"
    path.write_bytes(bytes(BYTES))
    with path.open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        private[7] = 42
        assert release(tmp_path) == 0
        assert private[7] == 42
        private.close()


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped.sys, "platform", "darwin")
    assert release(tmp_path) == 0


def test_openvino_gives_back_what_it_has_packed(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from bksdm_runtime.backends import ov

    released: list[Any] = []
    monkeypatch.setattr(ov, "release", released.append)
    bundle = bundles.load(toy_bundle)
    engine = open_engine(bundle, "vae_decoder", EngineSettings("openvino", threads=1, arithmetic="f32"))
    latents = {"latent_sample": np.zeros((1, 4, 8, 8), np.float32)}
    engine(latents)
    engine(latents)
    assert released == [bundle.root]
