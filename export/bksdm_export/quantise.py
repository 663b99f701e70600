"""Static int8: which layers of a graph multiply in 8 bits, and which stay fp32 because a measurement says so.

NNCF chooses the places and scales from real inputs and writes QuantizeLinear and DequantizeLinear into the ONNX graph,
so that ONNX Runtime and OpenVINO read one file. Ours is the measurement: each quantised layer is computed twice on the
same fp32 input, and one that loses more than INT8_LIMIT is given back its fp32 inputs and weights.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import onnx_ir as ir
from onnx_ir.passes import common as passes

from bksdm_export import precision, to_onnx
from bksdm_export.errors import ExportError
from bksdm_export.precision import Sensitive
from bksdm_export.reference import Case

# protobuf's own, with room for the graph; NNCF serialises what it is given.
MAX_BYTES = (1 << 31) - (64 << 20)

LAYERS = ("Conv", "MatMul", "Gemm")
_SHAPES = ("Reshape", "Transpose")
LOST = 1e9  # more than any error: a layer whose output is zero or no number


@dataclass(frozen=True)
class _Source:
    """Where a quantised input comes from. dequantise: its node; shapes: between that and the layer, layer first.

    value: what QuantizeLinear takes; of a weight, its int8 numbers.
    """

    dequantise: ir.Node
    shapes: tuple[ir.Node, ...]
    value: ir.Value
    is_weight: bool


def _quantised_inputs(node: ir.Node) -> Iterator[tuple[int, _Source]]:
    for index, value in enumerate(node.inputs):
        producer = None if value is None else value.producer()
        shapes: list[ir.Node] = []
        while producer is not None and producer.op_type in _SHAPES:
            shapes.append(producer)
            before = producer.inputs[0]
            producer = None if before is None else before.producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            continue
        numbers = producer.inputs[0]
        if numbers is None:
            continue
        quantise = numbers.producer()
        source = numbers if quantise is None else quantise.inputs[0]
        if source is not None:
            yield index, _Source(producer, tuple(shapes), source, quantise is None)


def quantise(component: str, model: ir.Model, cases: Sequence[Case]) -> tuple[ir.Model, tuple[Sensitive, ...]]:
    """The graph in int8, calibrated on the cases' inputs, and what was left out of it. `model` is not changed.

    Weights must be fp32 still (NNCF stumbles over a Cast behind a weight). Raises ExportError.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > MAX_BYTES:
        raise ExportError(
            f"{component} has {size / 1e9:.1f} GB of weights and int8 takes graphs up to {MAX_BYTES / 1e9:.1f} GB: "
            "choose a smaller variant, or another precision"
        )
    inputs = [dict(case.inputs) for case in cases]
    # Symmetric: against an asymmetric preset a fifth less error near timestep 0 (0.30 for 0.38, demo's U-Net).
    # TRANSFORMER leaves softmax and norms alone; without it ten times the error at the first step. Neither SmoothQuant
    # nor bias correction lowered the error (0.0283 without, 0.0286 with), and without them a layer that is given back
    # leaves nothing behind.
    with redirect_stdout(io.StringIO()):  # its progress bars: stdout carries the table and the path
        made = nncf.quantize(
            ir.to_proto(model),
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER if component.startswith("unet") else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                # Weights in half the range: without VNNI (AVX2 alone) OpenVINO adds two products in 16 bits, which
                # saturate. test_quantise's convolutions there: error 0.099 in the full range, 0.028 in half of it; with
                # VNNI 0.020 and 0.028. A bundle must be right wherever it is carried.
                overflow_fix=nncf.OverflowFix.ENABLE,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
            ),
        )
    quantised = ir.from_proto(made)
    errors = measure(model, quantised, cases)
    left_out = tuple(
        Sensitive(layer, error)
        for layer, error in sorted(errors.items(), key=lambda item: -item[1])
        if not error <= precision.INT8_LIMIT
    )
    give_back(quantised, model, {one.layer for one in left_out})
    quantise_at_convolutions(quantised)
    passes.RemoveUnusedNodesPass()(quantised)
    to_onnx.strip(quantised)
    passes.CheckerPass()(quantised)
    return quantised, left_out


def measure(model: ir.Model, quantised: ir.Model, cases: Sequence[Case]) -> dict[str, float]:
    """What int8 costs each quantised layer, by node: the worst case's rms error over the rms of the layer's output.

    Of each layer alone: what enters it is fp32's own and only then quantised, so one run measures all of them. No
    number, and a layer that gives zeros alone, is LOST.
    """
    import onnxruntime

    twin, layers = _twin(model, quantised)
    worst = dict.fromkeys(layers, 0.0)
    if not layers:
        return worst
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what it says about unused weights
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.onnx"
        ir.save(twin, path, external_data="weights", size_threshold_bytes=1024)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for case in cases:
            figures: Any = session.run(None, dict(case.inputs))  # error and energy of each layer, scalars
            for layer, error, energy in zip(layers, figures[::2], figures[1::2], strict=True):
                share = math.sqrt(error / energy) if error >= 0 and energy > 0 else LOST
                worst[layer] = max(worst[layer], min(share, LOST))
        del session
    return worst


def _twin(model: ir.Model, quantised: ir.Model) -> tuple[ir.Model, list[str]]:
    """The fp32 graph with every quantised layer in it a second time, whose outputs are errors and energies alone."""
    twin = ir.from_proto(ir.to_proto(model))
    graph = twin.graph
    exact = {node.name: node for node in graph}
    layers: list[str] = []
    graph.outputs.clear()
    for node in quantised.graph:
        own = exact.get(node.name)
        found = dict(_quantised_inputs(node)) if own is not None and node.op_type in LAYERS else {}
        if own is None or not found:
            continue
        inputs, added = list(own.inputs), []
        for index, source in found.items():
            inputs[index] = _twin_input(graph, inputs[index], source, added)
        second = ir.node(own.op_type, inputs, dict(own.attributes))
        difference = ir.node("Sub", [second.outputs[0], own.outputs[0]])
        error = ir.node("ReduceSumSquare", [difference.outputs[0]], {"keepdims": 0})
        energy = ir.node("ReduceSumSquare", [own.outputs[0]], {"keepdims": 0})
        graph.extend([*added, second, difference, error, energy])
        for name, last in (("error", error), ("energy", energy)):
            value = last.outputs[0]
            value.name, value.type, value.shape = f"{own.name}/{name}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            graph.outputs.append(value)
        layers.append(node.name or "")
    return twin, layers


def _twin_input(graph: ir.Graph, exact: ir.Value | None, source: _Source, added: list[ir.Node]) -> ir.Value:
    """What the quantised layer takes where the exact one takes `exact`; the nodes that make it go to `added`."""
    scales = [_constant(graph, value) for value in source.dequantise.inputs[1:]]
    numbers = _constant(graph, source.value) if source.is_weight else None
    if numbers is None:
        added.append(ir.node("QuantizeLinear", [exact, *scales]))
        numbers = added[-1].outputs[0]
    added.append(ir.node("DequantizeLinear", [numbers, *scales], dict(source.dequantise.attributes)))
    return added[-1].outputs[0]


def _constant(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """An initializer of the quantised graph as one of this graph."""
    assert value is not None
    assert value.name is not None
    name = f"int8/{value.name}"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=value.const_value))
    return graph.initializers[name]


def give_back(quantised: ir.Model, model: ir.Model, layers: Iterable[str]) -> None:
    """Turn layers of the quantised graph back to fp32 in place, with the inputs and weights that they have in `model`.

    What quantised them stays in the graph, for other layers or unused.
    """
    wanted = set(layers)
    exact = {node.name: node for node in model.graph}
    graph = quantised.graph
    for node in graph:
        if node.name not in wanted:
            continue
        for index, source in list(_quantised_inputs(node)):
            if not source.is_weight:
                last = source.shapes[-1] if source.shapes else node
                last.replace_input_with(0 if source.shapes else index, source.value)
                continue
            weight = exact[node.name].inputs[index]
            assert weight is not None  # quantised, so it was there
            assert weight.name is not None
            if weight.name not in graph.initializers:
                graph.register_initializer(ir.Value(name=weight.name, const_value=weight.const_value))
            node.replace_input_with(index, graph.initializers[weight.name])


def quantise_at_convolutions(quantised: ir.Model) -> None:
    """Quantise what enters a convolution right before it, in place, where NNCF did so before a Reshape or Transpose.

    The numbers are the same, one scale being everyone's. But OpenVINO 2026.4.1 gets them wrong in the other order: with
    the 16 proj_out of the demo's U-Net an evaluation differs by 0.071 from fp32, in this order by 0.019 as on ONNX
    Runtime (relative, rms).
    """
    graph = quantised.graph
    for node in [node for node in graph if node.op_type == "Conv"]:
        for index, source in list(_quantised_inputs(node)):
            if source.is_weight or not source.shapes or any(len(one.outputs[0].uses()) > 1 for one in source.shapes):
                continue
            scales = list(source.dequantise.inputs[1:])
            source.shapes[-1].replace_input_with(0, source.value)
            first = ir.node("QuantizeLinear", [node.inputs[index], *scales], name=f"{node.name}/QuantizeLinear")
            second = ir.node("DequantizeLinear", [first.outputs[0], *scales], name=f"{node.name}/DequantizeLinear")
            for one in (first, second):
                one.outputs[0].name = f"{one.name}/output"
            graph.insert_before(node, [first, second])
            node.replace_input_with(index, second.outputs[0])
