"""Fixtures for checkpoints on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from bksdm import checkpoint
from bksdm.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def mini_folder(mini_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini checkpoint, saved; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("mini") / "checkpoint"
    checkpoint.save(mini_checkpoint, folder)
    return folder


@pytest.fixture
def copy(mini_folder: Path, tmp_path: Path) -> Path:
    """A copy of the mini checkpoint's folder to spoil."""
    return Path(shutil.copytree(mini_folder, tmp_path / "copy"))


def models(whole: Checkpoint) -> dict[str, nn.Module]:
    return {"text_encoder": whole.text_encoder, "unet": whole.unet, "vae": whole.vae}


@pytest.fixture(scope="session")
def assert_same_tensors() -> Callable[[Checkpoint, Checkpoint], None]:
    """Every tensor of both checkpoints, by key, bit for bit."""

    def check(found: Checkpoint, expected: Checkpoint) -> None:
        for name, model in models(expected).items():
            ours, theirs = models(found)[name].state_dict(), model.state_dict()
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype, key
                assert ours[key].equal(tensor), f"{name} {key}"

    return check


@pytest.fixture
def mini_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the mini model's architecture pass for the variant's: what is tested here is the way to the files."""
    monkeypatch.setattr(checkpoint, "_difference", lambda row, unet: None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may reach the network by accident; huggingface_hub reads the variable when it is imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
