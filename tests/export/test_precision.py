"""Half precision: every island has its measurement, nothing else stays fp32, and nothing overflows at any size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bksdm import checkpoint as checkpoints
from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs, precision, to_onnx
from bksdm_export.errors import ExportError
from bksdm_export.precision import ERROR_LIMIT, Island, find_islands, to_half
from bksdm_export.ranges import FP16_MAX, Ranges, measure_ranges
from bksdm_export.recipe import export_variant
from bksdm_export.reference import Case, Reference
from bksdm_export.request import ExportRequest
from bksdm_export.storage import store
from bksdm_export.verify import ORT, TOLERANCES
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


def overflowing_residual(checkpoint: Checkpoint) -> Checkpoint:
    """Every block of the decoder adds to the stream that one of them makes far too large; its last norm undoes that."""
    block = checkpoint.vae.decoder.mid_block
    assert block is not None
    with torch.no_grad():
        block.resnets[0].conv2.weight *= 3e6
    return checkpoint


def offset(checkpoint: Checkpoint) -> Checkpoint:
    """A linear layer takes away what a norm before it adds: in fp16 nothing else is left of its inputs."""
    # transformers 5 has no text_model around it
    layer = checkpoint.text_encoder.get_submodule(f"{_text_model(checkpoint)}encoder.layers.0")
    with torch.no_grad():
        layer.layer_norm2.bias += 3000
        layer.mlp.fc1.weight -= layer.mlp.fc1.weight.mean(1, keepdim=True)
    return checkpoint


def _text_model(checkpoint: Checkpoint) -> str:
    return "text_model." if hasattr(checkpoint.text_encoder, "text_model") else ""


def islands_of(checkpoint: Checkpoint, component: str, case: Case) -> tuple[Island, ...]:
    return find_islands(component, measure_ranges(wrap(checkpoint, component), [case], ERROR_LIMIT))


def test_an_island_is_the_smallest_module_whose_output_is_in_range() -> None:
    ranges = Ranges(
        inside={"a.b.c": 1e6, "a.b": 10.0, "d": 1.0},
        outputs={"": 1.0, "a": 5.0, "a.b": 100.0, "a.b.c": 1e6, "d": 1.0},
        errors={"a.b.c": 0.5, "a.b": 1e-3},
    )
    assert find_islands("vae_decoder", ranges) == (Island("a.b", 1e6, 0.5),)


def test_an_island_within_an_island_is_one() -> None:
    ranges = Ranges(inside={"a": 5e4, "a.b": 9e4}, outputs={"": 1.0, "a": 1.0, "a.b": 1.0})
    assert find_islands("vae_decoder", ranges) == (Island("a", 9e4, 0.0),)


def test_half_of_the_range_is_left_to_other_inputs() -> None:
    outputs = {"": 1.0, "a": 1.0}
    assert find_islands("unet", Ranges({"a": 32_000.0}, outputs)) == ()
    assert find_islands("unet", Ranges({"a": 33_000.0}, outputs)) == (Island("a", 33_000.0, 0.0),)


def test_an_error_makes_an_island_that_reaches_to_where_its_inputs_come_from() -> None:
    ranges = Ranges(
        inside={"a.b.c": 9.0, "a.b": 3.0},
        outputs={"": 1.0, "a": 1.0, "a.b": 3.0, "a.b.c": 9.0},
        errors={"a.b.c": 0.3},
        edges={"a.b.c": 0.2, "a.b": 0.001},
    )
    assert find_islands("unet", ranges) == (Island("a.b", 9.0, 0.3),)


def test_a_component_whose_output_overflows_cannot_be_fp16() -> None:
    with pytest.raises(ExportError, match="unet cannot be fp16: its output reaches 70,000"):
        find_islands("unet", Ranges({"a": 7e4}, {"": 7e4, "a": 7e4}))


def test_a_component_that_its_inputs_in_fp16_change_cannot_be_fp16() -> None:
    ranges = Ranges({"a": 1.0}, {"": 1.0, "a": 1.0}, errors={"a": 0.3}, edges={"a": 0.2, "": 0.1})
    with pytest.raises(ExportError, match=r"unet cannot be fp16: inputs and output in fp16 alone change it by 1.0e-01"):
        find_islands("unet", ranges)


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


@pytest.mark.parametrize("factor", [1e6, 1e7])  # with the second, weights too are past fp16's end
def test_an_overflow_is_found_kept_in_fp32_and_the_picture_stays(
    build_smallest: Callable[..., Checkpoint], tmp_path: Path, factor: float
) -> None:
    case = decoder_case()
    checkpoint = overflowing(build_smallest(), factor)
    with torch.no_grad():
        expected = checkpoint.vae.decode(torch.from_numpy(case.inputs["latent_sample"])).sample.numpy()
    weights = {name: array.numpy().copy() for name, array in wrap(checkpoint, "vae_decoder").state_dict().items()}
    islands = islands_of(checkpoint, "vae_decoder", case)
    assert [island.module for island in islands] == ["decoder.mid_block.resnets.0"]
    assert islands[0].peak > 65_504

    path = export_half(checkpoint, "vae_decoder", tmp_path / "islands" / "model.onnx", islands)
    latents = case.inputs["latent_sample"].astype(np.float16)
    found = run(path, latent_sample=latents)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()  # measured 2.3e-3 with both

    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "norm2.weight"):
        key = f"decoder.mid_block.resnets.0.{name}"
        assert stored[key].dtype == np.float32
        np.testing.assert_array_equal(stored[key].reshape(weights[key].shape), weights[key])  # bit for bit
    assert stored["decoder.mid_block.resnets.1.conv1.weight"].dtype == np.float16

    # And the island is needed. Shown in torch, because ONNX Runtime's CPU provider computes fp16 nodes in fp32.
    for kept, finite in ((islands, True), ((), False)):
        image = in_half(overflowing(build_smallest(), factor), "vae_decoder", kept, case)
        assert np.isfinite(image).all() == finite
        assert (np.abs(image - expected).max() < 2e-2 * np.abs(expected).max()) == finite  # measured 5.6e-3, 6.1e-3


def in_half(checkpoint: Checkpoint, component: str, islands: tuple[Island, ...], case: Case) -> np.ndarray:
    """What torch computes in true half precision."""
    module = wrap(checkpoint, component)
    to_half(module, islands)
    tensors = [torch.from_numpy(array) for array in case.inputs.values()]
    with torch.no_grad():
        output = module(*(tensor.half() if tensor.is_floating_point() else tensor for tensor in tensors))
    assert output.dtype == torch.float16
    return output.float().numpy()


def test_an_overflow_of_the_residual_stream_reaches_over_lists_of_modules(
    build_smallest: Callable[..., Checkpoint],
) -> None:
    """ModuleLists ("decoder.mid_block.resnets") are never called: an island there ended in a KeyError."""
    case = decoder_case()
    checkpoint = overflowing_residual(build_smallest())
    with torch.no_grad():
        expected = checkpoint.vae.decode(torch.from_numpy(case.inputs["latent_sample"])).sample.numpy()
    islands = islands_of(checkpoint, "vae_decoder", case)
    assert [island.module for island in islands] == ["decoder"]
    found = in_half(checkpoint, "vae_decoder", islands, case)
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()  # measured 5.6e-4


def test_nothing_inside_an_island_changes(build_smallest: Callable[..., Checkpoint]) -> None:
    """Its weights went through fp16, and those past its end were infinite."""
    decoder = wrap(overflowing(build_smallest(), 1e7), "vae_decoder")
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    to_half(decoder, [Island("decoder.mid_block.resnets.0", 1e7, 1.0)])
    for name, tensor in decoder.state_dict().items():
        inside = name.startswith("decoder.mid_block.resnets.0.")
        assert tensor.dtype == (torch.float32 if inside else torch.float16)
        assert torch.equal(tensor, before[name] if inside else before[name].half())
    assert before["decoder.mid_block.resnets.0.conv1.weight"].abs().max() > FP16_MAX


def test_an_island_of_the_decoders_first_upper_weights_leaves_the_rest_fp16(
    build_smallest: Callable[..., Checkpoint],
) -> None:
    """diffusers casts to the dtype of those weights, so that fp32 went into fp16 convolutions."""
    case = decoder_case()
    with torch.no_grad():
        expected = wrap(build_smallest(), "vae_decoder")(torch.from_numpy(case.inputs["latent_sample"])).numpy()
    found = in_half(build_smallest(), "vae_decoder", (Island("decoder.up_blocks.0.resnets.0.norm1", 1.0, 1.0),), case)
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()  # measured 5.8e-3


def test_a_sum_that_cancels_is_kept_in_fp32_with_its_error(
    build_smallest: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """A layer whose inputs are a large offset and a small signal: nothing overflows, and fp16 loses the signal."""
    ids = np.array([[49_406, *range(320, 320 + 75), 49_407]], np.int32)
    case = Case("1 prompt", {"input_ids": ids}, {})
    with torch.no_grad():
        expected = wrap(offset(build_smallest()), "text_encoder")(torch.from_numpy(ids)).numpy()
    [island] = islands_of(offset(build_smallest()), "text_encoder", case)
    assert (
        island.module == f"model.{_text_model(build_smallest())}encoder.layers.0"
    )  # with the norm that its inputs come from
    assert island.error == pytest.approx(0.76, rel=0.3)
    assert 2900 < island.peak < precision.LIMIT

    accepted = TOLERANCES["fp16", "fp16"].components["text_encoder"] * np.abs(expected).max()
    for islands, name in (((island,), "island"), ((), "none")):
        path = export_half(offset(build_smallest()), "text_encoder", tmp_path / name / "model.onnx", islands)
        in_graph, in_torch = run(path, input_ids=ids), in_half(offset(build_smallest()), "text_encoder", islands, case)
        for found in (in_graph, in_torch):
            # Measured, graph and torch: 7.1e-4 and 8.7e-4 with it, 0.38 and 0.56 without; accepted is 1e-2.
            assert (np.abs(found - expected).max() < accepted) == bool(islands)


def test_an_export_lists_its_islands_with_their_figures(
    build_smallest: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoints.save(overflowing(build_smallest(), 1e7), tmp_path / "checkpoint")
    folder = export_variant(ExportRequest(tmp_path / "bundle", weights=str(tmp_path / "checkpoint"), precision="fp16"))
    brief = json.loads((folder / "bundle.json").read_text())["parity"]["components"]
    figures = json.loads((folder / "parity.json").read_text())["components"]
    assert {name: graph["islands"] for name, graph in brief.items()} == {
        name: graph["islands"] for name, graph in figures.items()
    }
    assert {name for name, graph in brief.items() if graph["islands"]} == {"vae_decoder"}
    [island] = brief["vae_decoder"]["islands"]
    assert island.keys() == {"module", "peak", "error"}
    assert island["module"] == "decoder.mid_block.resnets.0"
    assert island["peak"] > FP16_MAX
    assert island["error"] > ERROR_LIMIT
    assert f"{island['peak']:,.0f}" in (folder / "parity.html").read_text()


def test_a_model_of_small_values_needs_no_island(exported: Callable[..., Path]) -> None:
    parity = bundles.load(exported("fp16")).manifest.parity
    components = parity["components"]
    assert isinstance(components, dict)
    assert all(graph["islands"] == [] for graph in components.values())


# Pixels; the U-Net and the decoder run at every one of them, in fp16.
@pytest.mark.parametrize(
    ("height", "width"),
    [(64, 64), (72, 104), (128, 128), (256, 200), (1024, 64), pytest.param(512, 512, marks=pytest.mark.exhaustive)],
)
def test_fp16_is_finite_and_near_fp32_at_every_size(
    exported: Callable[..., Path], smallest_reference: Reference, height: int, width: int
) -> None:
    single, half = bundles.load(exported("fp32")), bundles.load(exported("fp16"))
    generator = np.random.default_rng(0)
    context = smallest_reference.cases["text_encoder"][1].outputs["last_hidden_state"][1:2]
    latents = generator.standard_normal((1, 4, height // 8, width // 8)).astype(np.float32)
    for timestep in (1.0, 958.04):
        inputs = {"sample": latents, "timestep": np.array([timestep], np.float32), "encoder_hidden_states": context}
        near(open_engine(single, "unet", ORT)(inputs), open_engine(half, "unet", ORT)(inputs))
    decoded = open_engine(single, "vae_decoder", ORT)({"latent_sample": latents})
    near(decoded, open_engine(half, "vae_decoder", ORT)({"latent_sample": latents}))
    image = {"sample": np.clip(decoded["sample"], -1, 1)}
    near(open_engine(single, "vae_encoder", ORT)(image), open_engine(half, "vae_encoder", ORT)(image))


@pytest.mark.parametrize(
    "side",
    [
        pytest.param(side, marks=pytest.mark.slow if side in (64, 320, 512, 1024) else pytest.mark.exhaustive)
        for side in range(64, 1088, 64)
    ],
)
def test_fp16_is_finite_from_64_to_1024_px(one_head: dict[tuple[str, str], Path], side: int) -> None:
    """With one head: eight of them at 1024 px are 17 GB of attention weights."""
    generator = np.random.default_rng(side)
    latents = generator.standard_normal((1, 4, side // 8, side // 8)).astype(np.float32)
    unet = {
        "sample": latents,
        "timestep": np.array([501.0], np.float32),
        "encoder_hidden_states": generator.standard_normal((1, 77, 32)).astype(np.float32),
    }
    image = generator.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    calls = {"unet": unet, "vae_decoder": {"latent_sample": latents}, "vae_encoder": {"sample": image}}
    for component, inputs in calls.items():
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
    for component in ("unet", "vae_decoder", "vae_encoder"):
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
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # measured below 3e-3


def test_timesteps_stay_fp32_because_fp16_cannot_hold_them(
    exported: Callable[..., Path], smallest_reference: Reference
) -> None:
    """958.04, as Euler asks for it, is 958.0 in fp16; and cos and sin of it in fp16 would be noise."""
    unet = open_engine(bundles.load(exported("fp16")), "unet", ORT)
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
    exported: Callable[..., Path], build_smallest: Callable[..., Checkpoint], smallest_reference: Reference
) -> None:
    """Against PyTorch with the same rounded weights the graph is as exact as any fp32 graph."""
    unet = open_engine(bundles.load(exported("fp32", "fp16")), "unet", ORT)
    case = smallest_reference.cases["unet"][0]
    exact = wrap(rounded(build_smallest()), "unet")
    with torch.no_grad():
        expected = exact(*(torch.from_numpy(array) for array in case.inputs.values())).numpy()
    found = unet(case.inputs)["out_sample"]
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * largest  # measured 4e-7
    rounding = np.abs(case.outputs["out_sample"] - expected).max()
    assert rounding > 50 * np.abs(found - expected).max()  # measured 658 times


def test_fp16_storage_halves_the_bundle(exported: Callable[..., Path]) -> None:
    def weights(storage: str, component: str) -> int:
        graph = onnx.load(exported("fp32", storage) / component / "model.onnx").graph
        return sum(len(tensor.raw_data) for tensor in graph.initializer)

    for component in graphs.COMPONENTS:  # measured 0.505 to 0.509: norms and biases stay
        assert weights("fp16", component) < 0.52 * weights("fp32", component), component


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
    store(model, "fp16")
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
    assert float(np.finfo(np.float16).max) == FP16_MAX
    assert FP16_MAX / 2 == precision.LIMIT
