"""The U-Net as two graphs: against diffusers' U-Net, and sampling with them against the same loop in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch

from bksdm import checkpoint as checkpoints
from bksdm.block_removal import compress
from bksdm.checkpoint import Checkpoint
from bksdm.variants import VARIANTS
from bksdm_export.recipe import export_variant
from bksdm_export.request import ExportRequest
from bksdm_export.step_cache import ShallowUNet, UNetWithFeatures
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings, open_engine
from bksdm_runtime.evaluations import plan_evaluations
from bksdm_runtime.pipeline import Pipeline, sample
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import make_schedule

ONE = EngineSettings(backend="onnxruntime", threads=1)

V2 = {"unet": {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True}}


def inputs(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 4, 8, 10, generator=generator),
        torch.tensor([701.0]),
        torch.randn(2, 77, width, generator=generator),
    )


@pytest.mark.parametrize("variant", ["sd-v1.4", "base", "small", "tiny"])
@pytest.mark.parametrize("changes", [{}, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_on_its_own_features_the_shallow_unet_is_the_whole_one(
    build_mini: Callable[..., Checkpoint], variant: str, changes: dict[str, dict[str, object]]
) -> None:
    checkpoint = build_mini(**changes)
    unet = checkpoint.unet if variant == "sd-v1.4" else compress(checkpoint.unet, VARIANTS[variant].removal)
    call = inputs(32)
    expected = unet(call[0], call[1].expand(2), call[2]).sample
    out, deep = UNetWithFeatures(unet)(*call)
    assert torch.equal(out, expected)
    assert deep.shape == (2, 32, 8, 10)
    assert torch.equal(ShallowUNet(unet)(*call, deep), expected)


@torch.no_grad()
def test_features_of_another_call_change_the_result(build_smallest: Callable[..., Checkpoint]) -> None:
    unet = build_smallest().unet
    other = UNetWithFeatures(unet)(*inputs(32, seed=1))[1]
    call = inputs(32)
    assert not torch.allclose(ShallowUNet(unet)(*call, other), UNetWithFeatures(unet)(*call)[0], atol=1e-2)


@pytest.fixture(scope="module")
def cached(smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of the smallest model with a step cache, by precision."""
    made: dict[str, Path] = {}

    def export(precision: str) -> Path:
        if precision not in made:
            folder = tmp_path_factory.mktemp("cached") / precision
            request = ExportRequest(folder, weights=str(smallest_folder), precision=precision, step_cache=True)
            made[precision] = export_variant(request)
        return made[precision]

    return export


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_both_graphs_are_compared_and_share_their_weights(
    cached: Callable[[str], Path], smallest_folder: Path, precision: str
) -> None:
    folder = cached(precision)
    bundle = bundles.load(folder)
    shallow = bundle.manifest.components["unet_shallow"]
    assert shallow.path == "unet/shallow.onnx"
    assert [spec.name for spec in bundle.manifest.components["unet"].outputs] == ["out_sample", "deep_features"]
    figures = json.loads((folder / "parity.json").read_text())["components"]
    assert figures["unet_shallow"]["error"] <= figures["unet_shallow"]["tolerance"]
    assert any("features" in case["label"] for case in figures["unet"]["cases"])
    weights = ir.load(folder / shallow.path).graph.initializers
    matrices = {name: value.const_value for name, value in weights.items() if value.const_value.size > 1024}
    assert matrices
    outside = {name for name, tensor in matrices.items() if not isinstance(tensor, ir.ExternalTensor)}
    assert not outside
    assert {tensor.location for tensor in matrices.values()} == {"model.onnx_data"}
    known = set(checkpoints.load(str(smallest_folder)).unet.state_dict())
    assert {name for name in weights if name.endswith((".weight", ".bias"))} <= known


def test_cached_sampling_is_the_same_loop_in_torch(cached: Callable[[str], Path], smallest_folder: Path) -> None:
    """DeepCache written out over diffusers' U-Net and scheduler, without our schedule, graphs or plan."""
    folder = cached("fp32")
    checkpoint = checkpoints.load(str(smallest_folder))
    whole, shallow = UNetWithFeatures(checkpoint.unet).eval(), ShallowUNet(checkpoint.unet).eval()
    scheduler = diffusers.PNDMScheduler.from_config(checkpoint.scheduler_config)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, 32, generator=generator)
    latents, deep = noise, torch.empty(0)
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            call = torch.cat([latents] * 2), timestep.float().reshape(1), context
            if i % 3 == 0:
                output, deep = whole(*call)
            else:
                output = shallow(*call, deep)
            negative, positive = output.chunk(2)
            latents = scheduler.step(negative + 5.0 * (positive - negative), timestep, latents).prev_sample
    bundle = bundles.load(folder)
    unet, outermost = (open_engine(bundle, name, ONE) for name in ("unet", "unet_shallow"))
    schedule = make_schedule(bundle.scheduler_config, steps=7)
    planned = plan_evaluations(len(schedule.timesteps), guided=True, cache_interval=3)
    guidance = np.array([5.0], np.float32)
    *_, (_, found) = sample(
        unet, schedule, noise.numpy(), context.numpy(), guidance, evaluations=planned, shallow=outermost
    )
    difference = np.abs(found - latents.numpy()).max() / np.abs(latents.numpy()).max()
    assert difference < 1e-5, difference


@pytest.mark.slow
def test_a_step_cache_in_half_precision_draws_nearly_the_same(cached: Callable[[str], Path]) -> None:
    request = Request("a red apple", steps=6, cache_interval=3)
    exact, half = (
        Pipeline.open(cached(precision), ONE).draw([request])[0].astype(int) for precision in ("fp32", "fp16")
    )
    assert abs(exact - half).mean() < 1
