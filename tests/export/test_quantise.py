"""int8: what NNCF makes of a graph, what is measured of it, and what an export accepts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from bksdm_export import int8_choice, likeness, sensitivity
from bksdm_export.cli import run
from bksdm_export.errors import ExportError
from bksdm_export.graphs import INT8_ERROR
from bksdm_export.likeness import Likeness, judge
from bksdm_export.precision import Sensitive
from bksdm_export.recipe import export_variant
from bksdm_export.reference import Case
from bksdm_export.request import ExportRequest
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request

openvino = pytest.importorskip("openvino", reason="needs openvino: pip install 'bksdm[openvino]'")
quantise = pytest.importorskip(
    "bksdm_export.quantise", reason="needs NNCF: pip install 'bksdm[int8]'", exc_type=ImportError
)


def convolutions(*, planted: bool) -> ir.Model:
    """Three convolutions [B, 8, h, w] -> the same, each with an activation behind it, and a last one to 4 channels.

    planted: one channel that enters the second is 80 times as large as the others, and its weights leave that one out:
    int8 keeps little of the others.
    """
    generator = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 8, "height", "width"]))
    initializers: list[ir.Value] = []
    nodes: list[ir.Node] = []
    value = x
    for i, channels in enumerate((8, 8, 8, 4)):
        weight = generator.standard_normal((channels, 8, 3, 3)).astype(np.float32) / 8
        if planted and i == 0:
            weight[3] *= 80
        if planted and i == 1:
            weight[:, 3] = 0
        held = ir.Value(name=f"conv{i}.weight", const_value=ir.Tensor(weight))
        initializers.append(held)
        nodes.append(
            ir.node("Conv", [value, held], {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}, name=f"conv{i}/Conv")
        )
        value = nodes[-1].outputs[0]
        value.name = f"c{i}"
        if i < 3:
            nodes.append(ir.node("Tanh" if i else "LeakyRelu", [value], name=f"act{i}"))
            value = nodes[-1].outputs[0]
            value.name = f"a{i}"
    value.name, value.type = "y", ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(["batch", 4, "height", "width"])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 18}, name="graph")
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    generator = np.random.default_rng(1)
    return [Case(str(i), {"x": generator.standard_normal((2, 8, 9, 13)).astype(np.float32)}, {}) for i in range(4)]


def on_ort(model: ir.Model, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))[0]


def on_openvino(model: ir.Model, inputs: Mapping[str, NDArray[Any]], path: Path) -> NDArray[np.float32]:
    ir.save(model, path)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(str(path), "CPU", config)(dict(inputs))[0]


def away(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(found - expected).sum() / np.square(expected).sum()))


def test_int8_graph_is_close_on_both_backends(cases: list[Case], tmp_path: Path) -> None:
    model = convolutions(planted=False)
    made, left_out = quantise.quantise("vae_decoder", model, cases)
    assert left_out == ()
    assert sum(node.op_type == "QuantizeLinear" for node in made.graph) == 4
    inputs = cases[0].inputs
    expected = on_ort(model, inputs)
    assert 1e-4 < away(on_ort(made, inputs), expected) < 0.06  # measured: 0.028
    # Equal without VNNI too, where the full range of weights saturates (0.099, measured).
    assert away(on_openvino(made, inputs, tmp_path / "int8.onnx"), expected) < 0.06


def test_a_layer_that_int8_wrecks_stays_fp32(cases: list[Case]) -> None:
    model = convolutions(planted=True)
    made, left_out = quantise.quantise("vae_decoder", model, cases)
    assert [one.layer for one in left_out] == ["conv1/Conv"]
    assert left_out[0].error > INT8_ERROR
    by_name = {node.name: node for node in made.graph}
    assert by_name["conv1/Conv"].inputs[0].producer().name == "act0"
    weight = by_name["conv1/Conv"].inputs[1].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), model.graph.initializers["conv1.weight"].const_value.numpy())
    assert by_name["conv2/Conv"].inputs[0].producer().op_type == "DequantizeLinear"
    inputs = cases[0].inputs
    assert away(on_ort(made, inputs), on_ort(model, inputs)) < 0.06


def test_a_cost_is_what_one_layer_alone_in_int8_changes_in_the_output(cases: list[Case]) -> None:
    model = convolutions(planted=False)
    made, left_out = quantise.quantise("vae_decoder", model, cases)
    assert left_out == ()
    costs = sensitivity.measure(model, made, cases[:2])
    assert set(costs) == {f"conv{i}/Conv" for i in range(4)}
    for layer, cost in costs.items():
        alone = ir.from_proto(ir.to_proto(made))
        quantise.give_back(alone, model, costs.keys() - {layer})
        shares = [away(on_ort(alone, case.inputs), on_ort(model, case.inputs)) for case in cases[:2]]
        assert cost.error == pytest.approx(math.sqrt(np.mean(np.square(shares))), rel=1e-3)
    assert [costs[f"conv{i}/Conv"].operations for i in (0, 3)] == [2 * 9 * 13 * 9 * 8 * 8, 2 * 9 * 13 * 9 * 8 * 4]


def test_operations_of_a_product_are_counted(cases: list[Case]) -> None:
    """[2, 8, 9, 13] @ [13, 5], as linear layers and attention have them."""
    model = convolutions(planted=False)
    graph = model.graph
    weight = ir.Value(
        name="linear.weight",
        const_value=ir.Tensor(np.random.default_rng(2).standard_normal((13, 5)).astype(np.float32)),
    )
    graph.register_initializer(weight)
    linear = ir.node("MatMul", [graph.outputs[0], weight], name="linear/MatMul")
    linear.outputs[0].name, linear.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    linear.outputs[0].shape = ir.Shape(["batch", 4, "height", 5])
    graph.append(linear)
    graph.outputs[:] = [linear.outputs[0]]
    made, _ = quantise.quantise("vae_decoder", model, cases)
    assert sensitivity.measure(model, made, cases[:1])["linear/MatMul"].operations == 2 * 4 * 9 * 5 * 13


def test_a_choice_is_taken_over_without_measuring(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions(planted=True)
    monkeypatch.setattr(quantise, "measure", None)
    taken = (Sensitive("conv1/Conv", 0.5), Sensitive("conv3/Conv", 0.1))
    made, left_out = quantise.quantise("vae_decoder", model, cases, chosen=taken)
    assert left_out == taken
    by_name = {node.name: node for node in made.graph}
    exact = [name for name in by_name if name.endswith("/Conv") and not _dequantised(by_name[name].inputs[0])]
    assert exact == ["conv1/Conv", "conv3/Conv"]
    with pytest.raises(ExportError, match="it keeps up/Conv of vae_decoder in fp32, and there is no such layer"):
        quantise.quantise("vae_decoder", model, cases, chosen=(Sensitive("up/Conv", 0.5),))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no report of an export: JSONDecodeError"),
        ("[]", "is no report of an export: TypeError"),
        (
            '{"components": {"unet": {}}}',
            "is of an older bksdm-export, which did not say enough: export that bundle again",
        ),
        ('{"components": {"unet": {"precision": "fp32"}}}', "is of an export without int8"),
    ],
)
def test_what_is_no_int8_bundle_is_refused(tmp_path: Path, content: str | None, why: str) -> None:
    if content is not None:
        (tmp_path / "parity.json").write_text(content)
    with pytest.raises(ExportError, match=why):
        export_variant(ExportRequest(tmp_path / "out", weights="demo", precision="int8", int8_like=tmp_path))


def test_layers_that_lose_most_for_what_they_save_are_left_out() -> None:
    costs = {
        "cheap": sensitivity.Cost(0.03, 10),
        "dear": sensitivity.Cost(0.04, 1000),
        "lost": sensitivity.Cost(sensitivity.LOST, 10**6),
        "large": sensitivity.Cost(0.05, 10**6),
        "free": sensitivity.Cost(0.0, 1),
    }
    assert sensitivity.choose(costs, 0.0) == {"cheap", "dear", "lost", "large"}
    assert sensitivity.choose(costs, 0.05) == {"cheap", "dear", "lost"}
    assert sensitivity.choose(costs, 0.065) == {"cheap", "lost"}  # squares add: 0.05 and 0.04 are 0.064
    assert sensitivity.choose(costs, 0.08) == {"lost"}


def test_probes_are_small_and_spread_over_the_steps() -> None:
    cases = [
        Case(str(i), {"x": np.zeros((1, 4, side, side), np.float32), "timestep": np.array([900.0 - i], np.float32)}, {})
        for side in (8, 4)
        for i in range(10)
    ]
    chosen = sensitivity.probes(cases)
    assert [case.label for case in chosen] == ["9", "6", "3", "0"]  # from the last step to the first
    assert {case.inputs["x"].shape[2] for case in chosen} == {4}
    assert sensitivity.probes(cases[:3]) == cases[2::-1]


def test_nothing_is_quantised_but_what_a_layer_multiplies(cases: list[Case]) -> None:
    """NNCF also quantises what enters a sum: twice the error of a decoder, for no time."""
    model = convolutions(planted=False)
    graph = model.graph
    conv = next(node for node in graph if node.name == "conv2/Conv")
    added = ir.node("Add", [conv.outputs[0], conv.inputs[0]], name="residual")
    added.outputs[0].name = "sum"
    ir.convenience.replace_all_uses_with(conv.outputs[0], added.outputs[0])
    added.replace_input_with(0, conv.outputs[0])
    graph.insert_after(conv, added)
    made, _ = quantise.quantise("vae_decoder", model, cases)
    layers = {node.op_type for node in made.graph for value in node.inputs if value is not None and _dequantised(value)}
    assert layers == {"Conv"}
    assert away(on_ort(made, cases[0].inputs), on_ort(model, cases[0].inputs)) < 0.06


def _dequantised(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--int8-error", "0.05"], "--int8-error is of --precision int8, and this is fp32: leave it out"),
        (["--precision", "int8", "--int8-error", "0"], "is not in the range x>0"),
        (["--int8-like", "out/base"], "--int8-like is of --precision int8, and this is fp32: leave it out"),
        (["--precision", "int8", "--int8-like", "out/base", "--int8-error", "0.1"], "leave one of them out"),
    ],
)
def test_an_error_that_cannot_be_kept_to_is_misuse(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--weights", "demo", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_quantised_right_before_a_convolution_and_never_before_a_transpose(cases: list[Case]) -> None:
    """OpenVINO 2026.4.1 computes a convolution wrongly whose input is quantised before a Reshape or Transpose."""
    model = convolutions(planted=False)
    graph = model.graph
    conv = next(node for node in graph if node.name == "conv1/Conv")
    turned = ir.node("Transpose", [conv.inputs[0]], {"perm": [0, 1, 3, 2]}, name="turn")
    turned.outputs[0].name = "turned"
    graph.insert_before(conv, turned)
    conv.replace_input_with(0, turned.outputs[0])
    made, _ = quantise.quantise("vae_decoder", model, cases)
    by_name = {node.name: node for node in made.graph}
    assert by_name["conv1/Conv"].inputs[0].producer().op_type == "DequantizeLinear"
    assert by_name["turn"].inputs[0].producer().name == "act0"
    assert away(on_ort(made, cases[0].inputs), on_ort(model, cases[0].inputs)) < 0.06


def test_graphs_past_protobufs_limit_are_refused(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "MAX_BYTES", 1000)
    with pytest.raises(ExportError, match=r"unet has 0\.0 GB of weights and int8 takes graphs up to"):
        quantise.quantise("unet", convolutions(planted=False), cases)


def test_likeness_is_psnr_and_lpips_and_a_lost_picture_fails() -> None:
    generator = np.random.default_rng(0)
    one = generator.integers(0, 250, (40, 56, 3)).astype(np.uint8)
    same = judge("onnxruntime", [(one, one)])
    assert same == Likeness("onnxruntime", (99.0,), (0.0,))
    assert same.failures() == []
    off = judge("onnxruntime", [(one + np.uint8(5), one)])
    assert off.psnr[0] == pytest.approx(20 * np.log10(255 / 5))
    lost = judge("openvino", [(None, one)]).failures()
    assert len(lost) == 2
    assert all(text.startswith("pictures on openvino are too far from PyTorch's exact ones: ") for text in lost)


@pytest.fixture(scope="module")
def exported_int8(smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The smallest model as an int8 bundle with a step cache, and its folder."""
    output = tmp_path_factory.mktemp("int8") / "bundle"
    export_variant(ExportRequest(output, weights=str(smallest_folder), precision="int8"))
    return output, smallest_folder


@pytest.mark.slow
def test_an_int8_bundle_opens_and_says_what_it_is(exported_int8: tuple[Path, Path]) -> None:
    folder, _ = exported_int8
    bundle = bundles.load(folder)
    assert (bundle.manifest.precision, bundle.manifest.storage) == ("int8", "int8")
    figures = json.loads((folder / "parity.json").read_text())
    assert [one["backend"] for one in figures["likeness"]] == ["onnxruntime", "openvino"]
    for one in figures["likeness"]:
        assert one["psnr"]["mean"] >= likeness.PSNR_BOUND
        assert one["lpips"]["mean"] <= likeness.LPIPS_BOUND
    assert "Against exact pictures" in (folder / "parity.html").read_text()
    pipeline = Pipeline.open(bundle, EngineSettings(backend="onnxruntime", threads=1))
    [pixels] = pipeline.draw([Request("a red apple", steps=2)])
    assert pixels.shape == (64, 64, 3)


@pytest.mark.slow
def test_a_bundle_like_another_keeps_the_same_layers(
    exported_int8: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, weights = exported_int8
    monkeypatch.setattr(quantise, "measure", None)
    made = export_variant(ExportRequest(tmp_path / "b", weights=str(weights), precision="int8", int8_like=other))
    kept = [
        {
            name: graph["sensitive"]
            for name, graph in json.loads((folder / "parity.json").read_text())["components"].items()
        }
        for folder in (other, made)
    ]
    assert kept[0] == kept[1]
    graphs = json.loads((made / "parity.json").read_text())["components"]
    assert graphs["unet"]["sensitive_of"].startswith("bundle (parity.json ")
    assert graphs["text_encoder"]["sensitive_of"] is None
    again = int8_choice.read(made)  # what it took over is still the first one's
    assert again["unet"].source == graphs["unet"]["sensitive_of"]
    assert bundles.load(made).manifest.precision == "int8"


@pytest.mark.slow
def test_a_quantisation_that_is_too_coarse_fails_and_leaves_its_page_alone(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likeness, "PSNR_BOUND", 90.0)
    why = r"pictures on onnxruntime are too far from .* dB PSNR.*; an --int8-error below 0.07 leaves more"
    with pytest.raises(ExportError, match=why):
        export_variant(ExportRequest(tmp_path / "bundle", weights=str(smallest_folder), precision="int8"))
    assert [one.name for one in tmp_path.iterdir()] == ["bundle.failed.html"]


def test_a_missing_nncf_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert run(["--weights", "demo", "--precision", "int8", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bksdm-export: --precision int8 needs nncf: pip install 'bksdm[int8]'"
    )
