"""What an export is compared with: real pictures at sizes off every grid, and the calls that made them."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs
from bksdm_export.errors import ExportError
from bksdm_export.reference import Reference, choose_sampler, make_reference, plan, samples
from bksdm_export.to_onnx import TRACED_SIZES
from bksdm_export.wrappers import wrap
from bksdm_runtime.bundle import ModelFacts


def facts(side: int) -> ModelFacts:
    return ModelFacts(77, 32, 4, 8, 0.18215, 8, side, side, 7.5)


@pytest.mark.parametrize("side", [64, 96, 128, 256, 512, 768])
@pytest.mark.parametrize("depth", ["quick", "full"])
def test_plan_has_odd_latents_a_batch_and_both_kinds_of_guidance(side: int, depth: str) -> None:
    requests = plan(facts(side), depth)
    sizes = [(request.height, request.width) for request in requests]
    largest = side if depth == "full" else min(side, 320)
    assert (largest, largest) in sizes
    odd = [(h, w) for h, w in sizes if (h // 8) % 2 and (w // 8) % 2]
    assert len(odd) >= 3
    assert max(max(size) for size in odd) < largest
    assert len(odd) > len(set(odd))  # two of one size: the runtime draws them in one batch
    assert {request.guidance_scale > 1 for request in requests} == {True, False}
    assert any(request.negative_prompt for request in requests)
    assert len({request.seed for request in requests}) == len(requests)


def test_the_sampler_is_the_first_that_the_settings_allow(mini_checkpoint: Checkpoint) -> None:
    assert choose_sampler(mini_checkpoint.scheduler_config) == "pndm"
    without_plms = {**mini_checkpoint.scheduler_config, "skip_prk_steps": False}
    assert choose_sampler({**without_plms, "clip_sample": False}) == "ddim"
    assert choose_sampler({**without_plms, "clip_sample": True}) == "euler"
    assert {request.sampler for request in plan(facts(64), sampler="euler")} == {"euler"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prediction_type": "sample"}, "cannot sample .* 'prediction_type' is 'sample'"),
        ({"original_inference_steps": 50}, "cannot sample .* 'original_inference_steps'"),
    ],
)
def test_settings_that_no_sampler_takes_are_refused(
    mini_checkpoint: Checkpoint, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ExportError, match=says):
        choose_sampler({**mini_checkpoint.scheduler_config, **settings})


def test_pictures_are_diffusers_own(mini_checkpoint: Checkpoint, mini_reference: Reference) -> None:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=mini_checkpoint.vae,
        text_encoder=mini_checkpoint.text_encoder,
        tokenizer=mini_checkpoint.tokenizer,
        unet=mini_checkpoint.unet,
        scheduler=diffusers.PNDMScheduler.from_config(mini_checkpoint.scheduler_config),  # pyright: ignore
        safety_checker=None,  # pyright: ignore
        feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = mini_reference.pictures[1]
    request = picture.request
    result = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    )
    np.testing.assert_allclose(picture.image, result.images[0], atol=1e-6)  # pyright: ignore - measured 6e-8
    assert picture.image.std() > 0.1  # a picture, not a plain surface


@torch.no_grad()
def test_cases_are_calls_of_the_components(mini_checkpoint: Checkpoint, mini_reference: Reference) -> None:
    for name, cases in mini_reference.cases.items():
        module = wrap(mini_checkpoint, name)
        for case in cases[:2]:
            output = module(*(torch.from_numpy(array) for array in case.inputs.values())).numpy()
            np.testing.assert_allclose(output, case.outputs[module.output], atol=1e-5)


def test_cases_have_the_tensors_of_the_contract(mini_checkpoint: Checkpoint, mini_reference: Reference) -> None:
    components = graphs.components(graphs.model_facts(mini_checkpoint), "fp32")
    assert mini_reference.cases.keys() == components.keys()
    for name, cases in mini_reference.cases.items():
        for case in cases:
            specs = {spec.name: spec for spec in (*components[name].inputs, *components[name].outputs)}
            tensors = {**case.inputs, **case.outputs}
            # In the contract's order: a wrapper is called by position.
            assert list(case.inputs) == [spec.name for spec in components[name].inputs]
            assert {tensor: str(array.dtype) for tensor, array in tensors.items()} == {
                tensor: specs[tensor].dtype for tensor in tensors
            }


def test_unet_cases_cover_batches_timesteps_and_sizes_that_were_not_traced(mini_reference: Reference) -> None:
    shapes = {case.inputs["sample"].shape for case in mini_reference.cases["unet"]}
    assert {shape[0] for shape in shapes} == {1, 2, 3}
    assert all(shape[2:] != (TRACED_SIZES["height"], TRACED_SIZES["width"]) for shape in shapes)
    timesteps = {float(t) for case in mini_reference.cases["unet"] for t in case.inputs["timestep"]}
    assert {914.0, 1.0} <= timesteps  # 12 steps of "leading" spacing: 914, 831, 831, 748, ... 1
    assert any(not t.is_integer() for t in timesteps)


def test_text_and_vae_cases_cover_the_vocabulary_every_position_and_batches(mini_reference: Reference) -> None:
    ids = np.concatenate([case.inputs["input_ids"] for case in mini_reference.cases["text_encoder"]])
    assert ids.max() > 49_000
    assert len(np.unique(ids)) > 200
    assert any(len(np.unique(row)) > 70 for row in ids)  # no padding: every position has a token of its own
    for name in ("vae_decoder", "vae_encoder"):
        assert {len(next(iter(case.inputs.values()))) for case in mini_reference.cases[name]} == {1, 2}


def test_a_batch_of_many_timesteps_comes_apart_into_samples(mini_reference: Reference) -> None:
    [mixed] = [case for case in mini_reference.cases["unet"] if len(case.inputs["timestep"]) > 1]
    apart = list(samples(mixed))
    assert [len(case.inputs["timestep"]) for case in apart] == [1, 1, 1]
    for name, array in {**mixed.inputs, **mixed.outputs}.items():
        found = np.concatenate([{**case.inputs, **case.outputs}[name] for case in apart])
        np.testing.assert_array_equal(found, array)
    first = mini_reference.cases["unet"][0]
    assert list(samples(first)) == [first]


def test_the_smallest_case_comes_first(mini_reference: Reference) -> None:
    for cases in mini_reference.cases.values():
        sizes = [sum(array.size for array in case.inputs.values()) for case in cases]
        assert sizes == sorted(sizes)


def test_the_unet_is_left_without_hooks(mini_checkpoint: Checkpoint) -> None:
    model = graphs.model_facts(mini_checkpoint)
    make_reference(mini_checkpoint, model, plan(model)[3:])
    assert not mini_checkpoint.unet._forward_hooks
