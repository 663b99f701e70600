"""What becomes of values in fp16 is measured: every result's size, and what rounding costs every operation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bksdm import checkpoint as checkpoints
from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs, ranges
from bksdm_export.precision import ERROR_LIMIT, LIMIT, find_islands
from bksdm_export.ranges import FP16_MAX, at_size, measure_ranges, with_own_size
from bksdm_export.reference import Case, PictureRequest, Reference, make_reference
from bksdm_export.wrappers import wrap


def decoder_case(height: int = 5, width: int = 7) -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case("latents", {"latent_sample": torch.randn(1, 4, height, width, generator=generator).numpy()}, {})


def case_of(*tensors: torch.Tensor) -> Case:
    return Case("", {str(number): tensor.numpy() for number, tensor in enumerate(tensors)}, {})


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


def test_values_are_those_of_the_modules_themselves(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    case = decoder_case()
    kept: dict[str, float] = {}
    for name, module in decoder.named_modules():
        module.register_forward_hook(  # some run twice
            lambda _m, _a, out, name=name: kept.__setitem__(name, max(float(out.abs().max()), kept.get(name, 0.0)))
        )
    measured = measure_ranges(decoder, [case])
    assert measured.outputs.keys() == kept.keys()
    assert measured.outputs == pytest.approx(kept)
    assert all(measured.inside[name] >= kept[name] for name in ("decoder.conv_in", "decoder.mid_block.resnets.0"))


def test_attention_logits_are_measured(build_smallest: Callable[..., Checkpoint]) -> None:
    """They are results of their own in the graph, inside one call of torch."""
    decoder = wrap(build_smallest(), "vae_decoder")
    attention = decoder.get_submodule("decoder.mid_block.attentions.0")
    with torch.no_grad():
        attention.to_q.weight *= 1e4  # pyright: ignore
        attention.to_k.weight *= 1e4  # pyright: ignore
    measured = measure_ranges(decoder, [decoder_case()], ERROR_LIMIT)
    assert measured.inside["decoder.mid_block.attentions.0"] > 1e7
    [island] = find_islands("vae_decoder", measured)
    assert island.module == "decoder.mid_block.attentions.0"


def test_hooks_are_gone_after_measuring(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    measure_ranges(decoder, [decoder_case()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def test_nan_in_an_intermediate_result_is_no_small_value(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    case = decoder_case()
    case.inputs["latent_sample"][0, 0, 0, 0] = math.nan
    assert measure_ranges(decoder, [case]).inside["decoder.conv_in"] == math.inf


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Linear(32, 16), (4, 32)),
        (torch.nn.Conv2d(4, 8, 3), (2, 4, 6, 6)),
        (torch.nn.GroupNorm(2, 8), (2, 8, 6, 6)),
        (torch.nn.LayerNorm(32), (4, 32)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_operations_error_is_that_of_rounded_inputs_weights_and_result(
    module: torch.nn.Module, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        exact = module(tensor)
        measured = measure_ranges(module, [case_of(tensor)]).errors[""]
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())
        assert measured == pytest.approx(relative(module(tensor.half().float()).half(), exact), rel=1e-6)
    assert 1e-5 < measured < 2e-3


class Attention(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("block", [ranges._BLOCK, 1])
def test_an_attentions_error_is_that_of_half_precision(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Large logits, whose rounding the softmax turns into an error of the weights; block: of queries, or one by one."""
    monkeypatch.setattr(ranges, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 16, generator=generator) * scale for scale in (8, 8, 1))
    exact = Attention()(query, key, value)
    half = [tensor.half() for tensor in (query, key, value)]
    logits = (half[0] * 16**-0.5) @ half[1].mT  # torch's half kernels, not fp32 rounded
    expected = relative(logits.softmax(-1) @ half[2], exact)
    measured = measure_ranges(Attention(), [case_of(query, key, value)])
    assert measured.errors[""] == pytest.approx(expected, rel=0.3)
    assert measured.errors[""] > 0.01
    assert measured.inside[""] == pytest.approx(float((query * 0.25 @ key.mT).abs().max()), rel=1e-3)


def test_an_overflow_and_a_weight_past_the_range_have_an_error_that_is_a_number() -> None:
    linear = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1e6, 1.0]]))
    measured = measure_ranges(linear, [case_of(torch.tensor([[1e-3, 0.0]]))], ERROR_LIMIT)
    assert measured.inside[""] == pytest.approx(1000)  # in range, and yet the weight is not
    assert measured.errors[""] == pytest.approx(1 - FP16_MAX / 1e6, rel=1e-3)
    assert measured.edges[""] < ERROR_LIMIT


class Offset(torch.nn.Module):
    """A sum that cancels: far values in, and weights that take their common part away."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 8, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
            self.linear.weight -= self.linear.weight.mean(1, keepdim=True)

    def forward(self, tensor: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.linear(tensor + 20.03 * timestep)


def test_edges_are_measured_outwards_until_they_are_exact_and_timesteps_stay_fp32() -> None:
    case = case_of(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([958.04]))
    outer = torch.nn.ModuleDict({"inner": Offset()})["inner"]
    measured = measure_ranges(outer, [case], ERROR_LIMIT)
    assert measured.errors["linear"] > 0.1
    assert measured.edges["linear"] > 0.1  # its inputs are lost before it can do anything
    assert measured.edges[""] < 2e-3  # the timestep, rounded to 958, would be exact here as well: its sum is not used
    assert measure_ranges(outer, [case]).edges == {}


def test_measuring_changes_no_result(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    latents = torch.from_numpy(decoder_case().inputs["latent_sample"])
    with torch.no_grad():
        expected = decoder(latents)
        measure_ranges(decoder, [decoder_case()], accepted=0.0)  # every operation is costly, every edge measured
        assert torch.equal(decoder(latents), expected)


def test_a_model_larger_than_its_cases_is_measured_at_its_own_size(mini_checkpoint: Checkpoint) -> None:
    facts = graphs.model_facts(mini_checkpoint)  # 64 px
    generator = np.random.default_rng(0)
    cases = [
        Case(
            f"evaluation {number}",
            {
                "sample": generator.standard_normal((2, 4, *size)).astype(np.float32),
                "timestep": np.array([timestep], np.float32),
                "encoder_hidden_states": generator.standard_normal((2, 77, 32)).astype(np.float32),
            },
            {},
        )
        for number, (size, timestep) in enumerate([((3, 3), 7.0), ((5, 5), 951.0), ((5, 5), 500.0), ((5, 5), 1.0)])
    ]
    *same, first, last = with_own_size("unet", cases, facts)
    assert same == cases
    assert [case.inputs["timestep"].tolist() for case in (first, last)] == [[951.0], [1.0]]
    assert first.inputs["sample"].shape == (1, 4, 8, 8)
    np.testing.assert_array_equal(first.inputs["sample"][0, :, :5, :5], cases[1].inputs["sample"][1])
    np.testing.assert_array_equal(first.inputs["sample"][0, :, :5, 5:], cases[1].inputs["sample"][1, :, :, 4:1:-1])
    np.testing.assert_array_equal(first.inputs["encoder_hidden_states"], cases[1].inputs["encoder_hidden_states"][1:])

    image = Case("40x40", {"sample": np.zeros((1, 3, 40, 40), np.float32)}, {})
    assert [case.inputs["sample"].shape for case in with_own_size("vae_encoder", [image], facts)] == [
        (1, 3, 40, 40),
        (1, 3, 64, 64),
    ]
    whole = Case("64x64", {"latent_sample": np.zeros((1, 4, 8, 8), np.float32)}, {})
    assert with_own_size("vae_decoder", [whole], facts) == (whole,)
    text = Case("1 prompt", {"input_ids": np.zeros((1, 77), np.int32)}, {})
    assert with_own_size("text_encoder", [text], facts) == (text,)


@pytest.fixture(scope="module")
def demo() -> tuple[Checkpoint, Reference]:
    """The trained checkpoint, and calls of its parts while it draws a picture."""
    checkpoint = checkpoints.load("demo")
    request = PictureRequest("an orange cat wearing a blue hat", 1234, 128, 128, 4, checkpoint.guidance_scale)
    return checkpoint, make_reference(checkpoint, graphs.model_facts(checkpoint), [request])


def test_the_trained_text_encoder_stays_within_fp16(demo: tuple[Checkpoint, Reference]) -> None:
    check_demo(demo, "text_encoder", demo[1].cases["text_encoder"])


# Pixels. ONNX Runtime's CPU provider cannot overflow inside a node; these are all the values that are between nodes.
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (64, 64),
        (200, 136),
        (1024, 64),
        *(pytest.param(side, side, marks=pytest.mark.slow) for side in (128, 320, 512, 1024)),
        *(
            pytest.param(side, side, marks=pytest.mark.exhaustive)
            for side in range(192, 1024, 64)
            if side not in (320, 512)
        ),
    ],
)
@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder"])
def test_trained_weights_stay_within_fp16_at_every_size(
    demo: tuple[Checkpoint, Reference], component: str, height: int, width: int
) -> None:
    """One sample, mirrored to the size: at 1024 px in 2.1 GB. A batch holds nothing else."""
    factor = 1 if component == "vae_encoder" else 8
    alone = [case for case in demo[1].cases[component] if len(case.inputs.get("timestep", [0])) == 1]
    cases = alone[:1]  # of the U-Net that from pure noise, which costs fp16 more
    if height * width <= 512 * 512:
        cases += alone[1:][-1:]
    check_demo(demo, component, [at_size(case, height // factor, width // factor) for case in cases])


def check_demo(demo: tuple[Checkpoint, Reference], component: str, cases: list[Case] | tuple[Case, ...]) -> None:
    measured = measure_ranges(wrap(demo[0], component), cases, ERROR_LIMIT)
    assert max(measured.inside.values()) < LIMIT / 4  # measured: at most 3,205, in the encoder
    assert max(measured.outputs.values()) < LIMIT / 4
    assert max(measured.errors.values()) < ERROR_LIMIT
    assert find_islands(component, measured) == ()
