"""Weights stored as int8 under fp32 arithmetic: exact against PyTorch with the same rounded weights, and folded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from bksdm_export import graphs
from bksdm_export.recipe import export_variant
from bksdm_export.request import ExportRequest
from bksdm_export.storage import round_weights, store
from bksdm_runtime import bundle as bundles
from bksdm_runtime.backends import ort
from bksdm_runtime.engine import EngineSettings, open_engine

INT8 = onnx.TensorProto.INT8


def _model(weights: dict[str, np.ndarray]) -> ir.Model:
    """A graph that gives its weights back."""
    values = {name: ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in weights.items()}
    nodes = [ir.node("Identity", [value], name=f"{name}/Identity") for name, value in values.items()]
    for node, (name, array) in zip(nodes, weights.items(), strict=True):
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{name}/out", ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [], [n.outputs[0] for n in nodes], nodes=nodes, initializers=list(values.values()), opset_imports={"": 18}
    )
    return ir.Model(graph, ir_version=10)


def _run(model: ir.Model) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip((one.name for one in model.graph.outputs), session.run(None, {}), strict=True))


def test_each_output_channel_has_its_own_scale_and_keeps_its_largest_weight() -> None:
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((5, 3, 3, 3)).astype(np.float32)
    kernel[1] *= 1000
    kernel[2] = 0
    matrix = generator.standard_normal((4, 6)).astype(np.float32)  # [inputs, outputs]
    matrix[:, 3] *= 1e-3
    vector = generator.standard_normal((7, 1, 1)).astype(np.float32)
    constant = generator.standard_normal((4, 6)).astype(np.float32)
    names = ("a.weight", "b.weight_transposed", "norm.weight", "frequencies")
    model = _model(dict(zip(names, (kernel, matrix, vector, constant), strict=True)))
    store(model, "int8")
    kinds = {name: value.const_value.dtype for name, value in model.graph.initializers.items() if value.const_value}
    assert kinds["a.weight"] == kinds["b.weight_transposed"] == ir.DataType.INT8
    assert kinds["norm.weight"] == kinds["frequencies"] == ir.DataType.FLOAT
    found = _run(model)
    np.testing.assert_array_equal(found["norm.weight/out"], vector)
    np.testing.assert_array_equal(found["frequencies/out"], constant)
    for name, expected, axis in (("a.weight/out", kernel, 0), ("b.weight_transposed/out", matrix, 1)):
        others = tuple(i for i in range(expected.ndim) if i != axis)
        largest = np.abs(expected).max(others, keepdims=True)
        assert (np.abs(found[name] - expected) <= largest / 254 * 1.0001).all()
        np.testing.assert_allclose(np.abs(found[name]).max(others, keepdims=True), largest, rtol=1e-6)


def test_pytorch_is_rounded_to_what_the_graph_holds() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    layer = cast(torch.nn.Linear, model[0])
    weight = layer.weight.detach().numpy().copy()
    round_weights(model, "int8")
    rounded = layer.weight.detach().numpy().copy()
    assert np.abs(rounded - weight).max() > 0
    for name, array in (("w.weight", rounded), ("w.weight_transposed", rounded.T.copy())):
        graph = _model({name: array})
        store(graph, "int8")
        found = _run(graph)[f"{name}/out"]
        # the scale of rounded weights may differ in its last bit
        np.testing.assert_allclose(found, array, rtol=3e-7)
    round_weights(model, "int8")
    np.testing.assert_allclose(layer.weight.detach().numpy(), rounded, rtol=3e-7)


def test_int8_storage_is_as_exact_as_fp32_and_quarters_the_graphs(exported: Callable[..., Path]) -> None:
    single, small = exported("fp32"), exported("fp32", "int8")
    manifest = bundles.load(small).manifest
    assert (manifest.precision, manifest.storage) == ("fp32", "int8")
    figures = {folder: json.loads((folder / "parity.json").read_text()) for folder in (single, small)}
    for name, graph in figures[small]["components"].items():
        assert graph["error"] <= graph["tolerance"] == figures[single]["components"][name]["tolerance"]
    rounding = figures[small]["rounding"]
    assert rounding["storage"] == "int8"
    assert 0 < rounding["mean_difference"] < rounding["tolerance"]

    def weights(folder: Path, component: str) -> int:
        return sum(len(tensor.raw_data) for tensor in onnx.load(folder / component / "model.onnx").graph.initializer)

    for component in graphs.COMPONENTS:  # a quarter, and the vectors
        assert weights(small, component) < 0.32 * weights(single, component), component


def test_onnx_runtime_makes_fp32_of_them_once_as_it_loads(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles.load(exported("fp32", "int8"))
    options = ort.session_options

    def kept(threads: int, of: bundles.Bundle) -> object:
        chosen = options(threads, of)
        chosen.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        return chosen

    monkeypatch.setattr(ort, "session_options", kept)
    for component in graphs.COMPONENTS:
        open_engine(bundle, component, EngineSettings(backend="onnxruntime", threads=1))
        loaded = onnx.load(tmp_path / "loaded.onnx").graph
        assert not [node.name for node in loaded.node if node.op_type == "DequantizeLinear"], component
        assert not [tensor.name for tensor in loaded.initializer if tensor.data_type == INT8], component


def test_openvino_reads_them_alike(exported: Callable[..., Path]) -> None:
    pytest.importorskip("openvino")
    bundle = bundles.load(exported("fp32", "int8"))
    generator = np.random.default_rng(0)
    model = bundle.manifest.model
    inputs = {
        "sample": generator.standard_normal((2, model.latent_channels, 16, 16)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": generator.standard_normal((2, model.tokens, model.context_dim)).astype(np.float32),
    }
    ours, theirs = (
        open_engine(bundle, "unet", EngineSettings(backend=backend, arithmetic="f32"))(inputs)["out_sample"]
        for backend in ("onnxruntime", "openvino")
    )
    # Measured: 0.9e-6; 0.0026 where the library quantises activations by its own default.
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()


def test_the_two_graphs_of_a_step_cache_share_int8_weights(smallest_folder: Path, tmp_path: Path) -> None:
    request = ExportRequest(tmp_path / "bundle", weights=str(smallest_folder), storage="int8", step_cache=True)
    bundle = bundles.load(export_variant(request))
    shallow = onnx.load(bundle.component_path("unet_shallow"), load_external_data=False).graph
    places = {
        entry.value
        for tensor in shallow.initializer
        if tensor.data_type == INT8
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx_data"}
