"""Models small enough to export many times, and bundles that are exported once for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir
import pytest
from filelock import FileLock

from bksdm import checkpoint as checkpoints
from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs, reference, to_onnx
from bksdm_export.recipe import export_variant
from bksdm_export.request import ExportRequest

# TensorRT-RTX has wheels for x86-64 alone: elsewhere its tests are not there.
if find_spec("tensorrt_rtx") is None:
    collect_ignore = ["test_tensorrt.py"]

# The smallest that still has every kind of part: skip connections over a downsampler, attention, a middle.
SMALLEST_UNET = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
}


@pytest.fixture(scope="session")
def build_smallest(build_mini: Callable[..., Checkpoint]) -> Callable[..., Checkpoint]:
    """A whole model with a U-Net of two stages: a quarter of the mini's time to export. A new one on every call."""

    def build(**unet: object) -> Checkpoint:
        return build_mini(unet={**SMALLEST_UNET, **unet})

    return build


@pytest.fixture(scope="session")
def smallest_folder(build_smallest: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`build_smallest()` as a diffusers folder."""
    folder = tmp_path_factory.mktemp("checkpoints") / "smallest"
    checkpoints.save(build_smallest(), folder)
    return folder


@pytest.fixture(scope="session")
def mini_reference(mini_checkpoint: Checkpoint) -> reference.Reference:
    """What PyTorch gives for the pictures that an export of the mini compares."""
    facts = graphs.model_facts(mini_checkpoint)
    return reference.make_reference(mini_checkpoint, facts, reference.plan(facts))


@pytest.fixture(scope="session")
def smallest_reference(build_smallest: Callable[..., Checkpoint]) -> reference.Reference:
    """The same of `build_smallest()`, of which `exported` makes bundles."""
    checkpoint = build_smallest()
    facts = graphs.model_facts(checkpoint)
    return reference.make_reference(checkpoint, facts, reference.plan(facts))


@pytest.fixture(scope="session")
def exported(smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exported(precision="fp32", storage=None): `build_smallest()` as a verified bundle. Read-only.

    Each is made once for all processes of a test run.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bundles"
    folder.mkdir(exist_ok=True)

    def export(precision: str = "fp32", storage: str | None = None) -> Path:
        output = folder / f"{precision}-{storage or precision}"
        with FileLock(f"{output}.lock"):
            if not output.exists():
                export_variant(
                    ExportRequest(output, weights=str(smallest_folder), precision=precision, storage=storage)
                )
        return output

    return export


@pytest.fixture
def faulty_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between export and verification, one number of the VAE decoder's graph changes."""
    save = to_onnx.save

    def changed(model: ir.Model, path: Path, shared: Path | None = None) -> None:
        weight = model.graph.initializers.get("decoder.up_blocks.2.resnets.0.conv1.weight")
        if weight is not None and weight.const_value is not None and path.parent.name == "vae_decoder":
            array = weight.const_value.numpy().copy()
            array.flat[0] += 0.5
            weight.const_value = ir.Tensor(array)
        save(model, path, shared)

    monkeypatch.setattr(to_onnx, "save", changed)
