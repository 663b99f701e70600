"""Static int8: which layers of a graph multiply in 8 bits, and which stay fp32 because a measurement says so.

NNCF chooses the places and scales from real inputs and writes QuantizeLinear and DequantizeLinear into the ONNX graph,
so that ONNX Runtime and OpenVINO read one file. Ours is the measurement (`sensitivity`): what int8 costs each layer is
seen at the graph's output, and those that cost the most for the operations they save are given back their fp32 inputs
and weights, until what is left is within the error that was asked for.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout

import nncf
import onnx_ir as ir
from onnx_ir.passes import common as passes

from bksdm_export import to_onnx
from bksdm_export.errors import ExportError
from bksdm_export.graphs import INT8_ERROR
from bksdm_export.precision import Sensitive
from bksdm_export.reference import Case
from bksdm_export.sensitivity import LAYERS, SHAPES, choose, measure, probes, quantised_inputs

log = logging.getLogger(__name__)

# protobuf's own, with room for the graph; NNCF serialises what it is given.
MAX_BYTES = (1 << 31) - (64 << 20)


def quantise(
    component: str,
    model: ir.Model,
    cases: Sequence[Case],
    error: float = INT8_ERROR,
    progress: Callable[[str], None] = log.info,
    chosen: tuple[Sensitive, ...] | None = None,
) -> tuple[ir.Model, tuple[Sensitive, ...]]:
    """The graph in int8, calibrated on the cases' inputs, and what was left out of it. `model` is not changed.

    error: root mean square of what int8 may change in an output, over that of the output. progress: is told a stage.
    chosen: the layers to leave out, where an earlier export measured them; `error` is then not asked. Weights
    must be fp32 still (NNCF stumbles over a Cast behind a weight). Raises ExportError.
    """
    layers_of = {node.name for node in model.graph if node.op_type in LAYERS}
    if unknown := [one.layer for one in chosen or () if one.layer not in layers_of]:
        raise ExportError(
            f"--int8-like is of another model: it keeps {unknown[0]} of {component} in fp32, and there is no such layer"
        )
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
    give_back_others(quantised)
    if chosen is None:
        progress(f"{component}: measuring what int8 costs each layer")
        costs = measure(model, quantised, probes(cases))
        layers = sorted(choose(costs, error), key=lambda one: -costs[one].error)
        chosen = tuple(Sensitive(layer, costs[layer].error) for layer in layers)
    give_back(quantised, model, [one.layer for one in chosen])
    quantise_at_convolutions(quantised)
    passes.RemoveUnusedNodesPass()(quantised)
    to_onnx.strip(quantised)
    passes.CheckerPass()(quantised)
    return quantised, chosen


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
        for index, source in list(quantised_inputs(node)):
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


def give_back_others(quantised: ir.Model) -> None:
    """Take fp32 again, in place, wherever NNCF quantised what no layer multiplies: sums, norms, the timestep's waves.

    It saves nothing there: the demo's decoder takes 47 ms with and without, and has 0.014 of error with, 0.010 without
    (one thread, AMX).
    """
    for node in quantised.graph:
        if node.op_type in LAYERS or (node.op_type in SHAPES and _is_before_a_layer(node)):
            continue
        for index, value in enumerate(node.inputs):
            dequantise = None if value is None else value.producer()
            if dequantise is None or dequantise.op_type != "DequantizeLinear" or dequantise.inputs[0] is None:
                continue
            quantise_ = dequantise.inputs[0].producer()
            if quantise_ is not None:
                node.replace_input_with(index, quantise_.inputs[0])


def _is_before_a_layer(node: ir.Node) -> bool:
    """Whether a layer takes what a node gives, at once or by way of others of SHAPES."""
    uses = list(node.outputs[0].uses())
    return any(
        use.node.op_type in LAYERS or (use.node.op_type in SHAPES and _is_before_a_layer(use.node)) for use in uses
    )


def quantise_at_convolutions(quantised: ir.Model) -> None:
    """Quantise what enters a convolution right before it, in place, where NNCF did so before a Reshape or Transpose.

    The numbers are the same, one scale being everyone's. But OpenVINO 2026.4.1 gets them wrong in the other order: with
    the 16 proj_out of the demo's U-Net an evaluation differs by 0.071 from fp32, in this order by 0.019 as on ONNX
    Runtime (relative, rms).
    """
    graph = quantised.graph
    for node in [node for node in graph if node.op_type == "Conv"]:
        for index, source in list(quantised_inputs(node)):
            if source.is_weight or not source.shapes or any(len(one.outputs[0].uses()) > 1 for one in source.shapes):
                continue
            if any(one.op_type == "Resize" for one in source.shapes):  # a quarter of the numbers before it
                continue
            scales = list(source.dequantise.inputs[1:])
            source.shapes[-1].replace_input_with(0, source.value)
            first = ir.node("QuantizeLinear", [node.inputs[index], *scales], name=f"{node.name}/QuantizeLinear")
            second = ir.node("DequantizeLinear", [first.outputs[0], *scales], name=f"{node.name}/DequantizeLinear")
            for one in (first, second):
                one.outputs[0].name = f"{one.name}/output"
            graph.insert_before(node, [first, second])
            node.replace_input_with(index, second.outputs[0])
