"""Half precision: every island has its measurement, nothing else stays fp32, and nothing overflows at any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs, precision, to_onnx
from bksdm_export.errors import ExportError
from bksdm_export.precision import Island, Ranges, find_islands, measure_ranges, store_fp16, to_half
from bksdm_export.reference import Case, Reference
from bksdm_export.wrappers import wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import open_engine


def decoder_case(height: int = 5, width: int = 7) -> Case:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, height, width, generator=generator).numpy()
    return Case("latents", {"latent_sample": latents}, {})


def overflowing(checkpoint: Checkpoint, factor: float = 1e6) -> Checkpoint:
    """The same pictures by way of values past fp16's range: a group norm follows, which undoes any factor."""
    block = checkpoint.vae.decoder.mid_block
    assert block is not None
    with torch.no_grad():
        block.resnets[0].conv1.weight *= factor
        block.resnets[0].conv1.bias *= factor
    return checkpoint


def test_ranges_are_those_of_the_modules_themselves(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    case = decoder_case()
    kept: dict[str, float] = {}
    for name, module in decoder.named_modules():
        module.register_forward_hook(  # some run twice
            lambda _m, _a, out, name=name: kept.__setitem__(name, max(float(out.abs().max()), kept.get(name, 0.0)))
        )
    ranges = measure_ranges(decoder, [case])
    assert ranges.outputs.keys() == kept.keys()
    assert ranges.outputs == pytest.approx(kept)
    assert all(ranges.inside[name] >= kept[name] for name in ("decoder.conv_in", "decoder.mid_block.resnets.0"))


def test_attention_logits_are_measured(build_smallest: Callable[..., Checkpoint]) -> None:
    """They are results of their own in the graph, inside one call of torch."""
    decoder = wrap(build_smallest(), "vae_decoder")
    attention = decoder.get_submodule("decoder.mid_block.attentions.0")
    with torch.no_grad():
        attention.to_q.weight *= 1e4  # pyright: ignore
        attention.to_k.weight *= 1e4  # pyright: ignore
    ranges = measure_ranges(decoder, [decoder_case()])
    assert ranges.inside["decoder.mid_block.attentions.0"] > 1e7
    [island] = find_islands("vae_decoder", ranges)
    assert island.module == "decoder.mid_block.attentions.0"


def test_hooks_are_gone_after_measuring(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    measure_ranges(decoder, [decoder_case()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def test_an_island_is_the_smallest_module_whose_output_is_in_range() -> None:
    ranges = Ranges(
        inside={"a.b.c": 1e6, "a.b": 10.0, "d": 1.0},
        outputs={"": 1.0, "a": 5.0, "a.b": 100.0, "a.b.c": 1e6, "d": 1.0},
    )
    assert find_islands("vae_decoder", ranges) == (Island("a.b", 1e6),)


def test_an_island_within_an_island_is_one() -> None:
    ranges = Ranges(inside={"a": 5e4, "a.b": 9e4}, outputs={"": 1.0, "a": 1.0, "a.b": 1.0})
    assert find_islands("vae_decoder", ranges) == (Island("a", 9e4),)


def test_half_of_the_range_is_left_to_other_inputs() -> None:
    assert find_islands("unet", Ranges({"a": 32_000.0}, {"": 1.0, "a": 1.0})) == ()
    assert find_islands("unet", Ranges({"a": 33_000.0}, {"": 1.0, "a": 1.0})) == (Island("a", 33_000.0),)


def test_a_component_whose_output_overflows_cannot_be_fp16() -> None:
    with pytest.raises(ExportError, match="unet cannot be fp16: its output reaches 70,000"):
        find_islands("unet", Ranges({"a": 7e4}, {"": 7e4, "a": 7e4}))


def test_nan_in_an_intermediate_result_is_no_small_value(build_smallest: Callable[..., Checkpoint]) -> None:
    decoder = wrap(build_smallest(), "vae_decoder")
    case = decoder_case()
    case.inputs["latent_sample"][0, 0, 0, 0] = math.nan
    assert measure_ranges(decoder, [case]).inside["decoder.conv_in"] == math.inf


def export_half(checkpoint: Checkpoint, component: str, path: Path, islands: tuple[Island, ...]) -> Path:
    spec = graphs.components(graphs.model_facts(checkpoint), "fp16")[component]
    module = wrap(checkpoint, component)
    to_half(module, islands)
    to_onnx.save(to_onnx.to_onnx(to_onnx.to_exported_program(module, spec), spec), path)
    return path


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [output] = session.run(None, inputs)
    return np.asarray(output, np.float32)


def test_an_overflow_is_found_kept_in_fp32_and_the_picture_stays(
    build_smallest: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    case = decoder_case()
    checkpoint = overflowing(build_smallest())
    with torch.no_grad():
        expected = checkpoint.vae.decode(torch.from_numpy(case.inputs["latent_sample"])).sample.numpy()
    islands = find_islands("vae_decoder", measure_ranges(wrap(checkpoint, "vae_decoder"), [case]))
    assert [island.module for island in islands] == ["decoder.mid_block.resnets.0"]
    assert islands[0].peak > 65_504

    path = export_half(checkpoint, "vae_decoder", tmp_path / "islands" / "model.onnx", islands)
    latents = case.inputs["latent_sample"].astype(np.float16)
    found = run(path, latent_sample=latents)
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()  # measured 1.1e-3

    graph = onnx.load(path).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name.endswith("weight")}
    inside = {name for name in stored if name.startswith("decoder.mid_block.resnets.0.conv")}
    assert {stored[name] for name in inside} == {onnx.TensorProto.FLOAT}
    assert stored["decoder.mid_block.resnets.1.conv1.weight"] == onnx.TensorProto.FLOAT16

    # And the island is needed. Shown in torch, because ONNX Runtime's CPU provider computes fp16 nodes in fp32.
    for kept, finite in ((islands, True), ((), False)):
        module = wrap(overflowing(build_smallest()), "vae_decoder")
        to_half(module, kept)
        with torch.no_grad():
            image = module(torch.from_numpy(latents)).float().numpy()
        assert np.isfinite(image).all() == finite
        assert (np.abs(image - expected).max() < 1e-2 * np.abs(expected).max()) == finite  # measured 1.5e-3


def test_the_mini_needs_no_island(exported: Callable[..., Path]) -> None:
    parity = bundles.load(exported("fp16")).manifest.parity
    components = parity["components"]
    assert isinstance(components, dict)
    assert all(graph["islands"] == [] for graph in components.values())


# Pixels; the U-Net and the decoder run at every one of them, in fp16.
@pytest.mark.parametrize(
    ("height", "width"),
    [(64, 64), (72, 104), (128, 128), (256, 200), (1024, 64), pytest.param(512, 512, marks=pytest.mark.slow)],
)
def test_fp16_is_finite_and_near_fp32_at_every_size(
    exported: Callable[..., Path], mini_reference: Reference, height: int, width: int
) -> None:
    single, half = bundles.load(exported("fp32")), bundles.load(exported("fp16"))
    generator = np.random.default_rng(0)
    context = mini_reference.cases["text_encoder"][1].outputs["last_hidden_state"][1:2]
    latents = generator.standard_normal((1, 4, height // 8, width // 8)).astype(np.float32)
    for timestep in (1.0, 958.04):
        inputs = {"sample": latents, "timestep": np.array([timestep], np.float32), "encoder_hidden_states": context}
        near(open_engine(single, "unet")(inputs), open_engine(half, "unet")(inputs))
    decoded = open_engine(single, "vae_decoder")({"latent_sample": latents})
    near(decoded, open_engine(half, "vae_decoder")({"latent_sample": latents}))
    image = {"sample": np.clip(decoded["sample"], -1, 1)}
    near(open_engine(single, "vae_encoder")(image), open_engine(half, "vae_encoder")(image))


@pytest.mark.slow
@pytest.mark.parametrize("side", range(64, 1088, 64))
def test_fp16_is_finite_from_64_to_1024_px(one_head: dict[tuple[str, str], Path], side: int) -> None:
    """With one head: eight of them at 1024 px are 17 GB of attention weights."""
    generator = np.random.default_rng(side)
    latents = generator.standard_normal((1, 4, side // 8, side // 8)).astype(np.float32)
    unet = {
        "sample": latents,
        "timestep": np.array([501.0], np.float32),
        "encoder_hidden_states": generator.standard_normal((1, 77, 32)).astype(np.float32),
    }
    for component, inputs in (("unet", unet), ("vae_decoder", {"latent_sample": latents})):
        expected = run(one_head[component, "fp32"], **inputs)
        halves = {name: array if name == "timestep" else array.astype(np.float16) for name, array in inputs.items()}
        near({"": expected}, {"": run(one_head[component, "fp16"], **halves)})


@pytest.fixture(scope="module")
def one_head(
    build_smallest: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Graphs of a model with one attention head, by component and precision."""
    folder = tmp_path_factory.mktemp("one-head")
    paths: dict[tuple[str, str], Path] = {}
    for component in ("unet", "vae_decoder"):
        for kind in ("fp32", "fp16"):
            checkpoint = build_smallest(attention_head_dim=1)
            spec = graphs.components(graphs.model_facts(checkpoint), kind)[component]
            module = wrap(checkpoint, component)
            if kind == "fp16":
                to_half(module, ())
            paths[component, kind] = folder / component / f"{kind}.onnx"
            program = to_onnx.to_exported_program(module, spec)
            to_onnx.save(to_onnx.to_onnx(program, spec), paths[component, kind])
    return paths


def near(single: dict, half: dict) -> None:
    [expected], [found] = single.values(), half.values()
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # measured below 4e-3


def test_timesteps_stay_fp32_because_fp16_cannot_hold_them(
    exported: Callable[..., Path], mini_reference: Reference
) -> None:
    """958.04, as Euler asks for it, is 958.0 in fp16; and cos and sin of it in fp16 would be noise."""
    unet = open_engine(bundles.load(exported("fp16")), "unet")
    assert {spec.name: spec.dtype for spec in unet.component.inputs}["timestep"] == "float32"
    graph = onnx.load(exported("fp16") / "unet" / "model.onnx").graph
    frequencies = [tensor for tensor in graph.initializer if tensor.name == "unsqueeze_1"]
    assert [tensor.data_type for tensor in frequencies] == [onnx.TensorProto.FLOAT]


def test_text_encoder_mask_stays_finite_in_fp16(exported: Callable[..., Path]) -> None:
    """-3.4e38 is minus infinity in fp16, and a row of it would be NaN after the softmax."""
    path = exported("fp16") / "text_encoder" / "model.onnx"
    for tensor in onnx.load(path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        assert not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all(), tensor.name
    ids = np.full((3, 77), 49_407, np.int32)
    assert np.isfinite(run(path, input_ids=ids)).all()


def rounded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its matrices and kernels rounded to fp16, in fp32."""
    with torch.no_grad():
        for model in (checkpoint.text_encoder, checkpoint.unet, checkpoint.vae):
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and name.endswith("weight") and "position_embedding" not in name:
                    parameter.copy_(parameter.half().float())
    return checkpoint


def test_fp16_storage_costs_what_rounding_the_weights_costs(
    exported: Callable[..., Path], build_mini: Callable[..., Checkpoint], mini_reference: Reference
) -> None:
    """Against PyTorch with the same rounded weights the graph is as exact as any fp32 graph."""
    unet = open_engine(bundles.load(exported("fp32", "fp16")), "unet")
    case = mini_reference.cases["unet"][0]
    exact = wrap(rounded(build_mini()), "unet")
    with torch.no_grad():
        expected = exact(*(torch.from_numpy(array) for array in case.inputs.values())).numpy()
    found = unet(case.inputs)["out_sample"]
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * largest  # measured 1.2e-6
    rounding = np.abs(case.outputs["out_sample"] - expected).max()
    assert rounding > 50 * np.abs(found - expected).max()  # measured 1,000 times


def test_fp16_storage_halves_the_bundle(exported: Callable[..., Path]) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("model.onnx*"))

    assert size(exported("fp32", "fp16")) < 0.56 * size(exported("fp32"))


def test_onnx_runtime_folds_the_casts_when_it_loads(exported: Callable[..., Path], tmp_path: Path) -> None:
    for component in graphs.COMPONENTS:
        path = exported("fp32", "fp16") / component / "model.onnx"
        stored = onnx.load(path).graph
        weights = {tensor.name for tensor in stored.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
        assert weights
        assert all(name.endswith((".weight", ".weight_transposed")) for name in weights)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{component}.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        loaded = onnx.load(tmp_path / f"{component}.onnx").graph
        floats = [tensor for tensor in loaded.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
        casts = [node for node in loaded.node if node.op_type == "Cast" and node.input[0] in weights]
        assert (floats, casts) == ([], [])


def test_weights_past_the_range_of_fp16_are_stored_in_fp32(
    build_smallest: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = overflowing(build_smallest(), factor=1e7)
    spec = graphs.components(graphs.model_facts(checkpoint), "fp32")["vae_decoder"]
    model = to_onnx.to_onnx(to_onnx.to_exported_program(wrap(checkpoint, "vae_decoder"), spec), spec)
    store_fp16(model)
    to_onnx.save(model, tmp_path / "model.onnx")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored["decoder.mid_block.resnets.0.conv1.weight"] == onnx.TensorProto.FLOAT
    assert stored["decoder.mid_block.resnets.0.conv2.weight"] == onnx.TensorProto.FLOAT16
    latents = decoder_case().inputs["latent_sample"]
    with torch.no_grad():
        expected = checkpoint.vae.decode(torch.from_numpy(latents)).sample.numpy()
    found = run(tmp_path / "model.onnx", latent_sample=latents)
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()  # measured 1e-3


def test_limit_is_half_of_fp16s_largest() -> None:
    assert float(np.finfo(np.float16).max) == precision.FP16_MAX
    assert precision.FP16_MAX / 2 == precision.LIMIT
