"""The folder opens in Optimum's pipeline, and gives the same picture from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bksdm_export.reference import Reference
from bksdm_export.verify import compare_picture

optimum = pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx")

# Optimum and diffusers speak of their own deprecations (torch.jit.script at import, config attributes at call).
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("precision", "storage", "accepted"),
    [("fp32", "fp32", 0.01), ("fp32", "fp16", 0.2), ("fp16", "fp16", 0.3)],  # measured: 0, 0.025, 0.05 of 255
)
@pytest.mark.parametrize("index", [1, 3], ids=["guided", "unguided"])
def test_optimum_draws_the_same_picture(
    exported: Callable[..., Path],
    smallest_reference: Reference,
    precision: str,
    storage: str,
    accepted: float,
    index: int,
) -> None:
    pipeline = optimum.ORTStableDiffusionPipeline.from_pretrained(exported(precision, storage))
    pipeline.set_progress_bar_config(disable=True)
    picture = smallest_reference.pictures[index]
    request = picture.request
    # The noise itself, because diffusers would draw another in fp16.
    shape = (1, 4, request.height // 8, request.width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    image = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        latents=noise,
        output_type="np",
    ).images[0]
    pixels = (image * 255).round().astype(np.uint8)
    assert compare_picture(picture, pixels).mean < accepted


def test_optimum_encodes_pictures(exported: Callable[..., Path], smallest_reference: Reference) -> None:
    pipeline = optimum.ORTStableDiffusionPipeline.from_pretrained(exported("fp32"))
    case = smallest_reference.cases["vae_encoder"][0]
    encoded = pipeline.vae.encode(torch.from_numpy(case.inputs["sample"])).latent_dist.parameters.numpy()
    expected = case.outputs["latent_parameters"]
    assert np.abs(encoded - expected).max() < 2e-5 * np.abs(expected).max()  # measured 2.3e-6
