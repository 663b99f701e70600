"""What int8 costs each layer, seen at the graph's output, and which layers are therefore left in fp32.

One graph holds every layer twice, exact and quantised, behind a switch; with one switch on, the change of the output is
what this layer alone costs. Layers lose independently, so that their squares add up, and a budget for the whole goes
to those that save the most operations for the least error. On the demo's U-Net, for the same 0.8 of its operations in
int8: 0.068 of the output this way, 0.125 where what decides is each layer's error at its own output.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bksdm_export.reference import Case

LAYERS = ("Conv", "MatMul", "Gemm")
# What only moves numbers, so that quantising before it and after it are the same. (The exporter writes no Resize but
# that of nearest neighbours.)
SHAPES = ("Reshape", "Transpose", "Resize")
LOST = 1e9  # more than any error: an output that is no number
PROBES = 4  # real inputs that every layer is measured with: as many evaluations a layer


@dataclass(frozen=True)
class Source:
    """Where a quantised input comes from. dequantise: its node; shapes: between that and the layer, layer first.

    value: what QuantizeLinear takes; of a weight, its int8 numbers.
    """

    dequantise: ir.Node
    shapes: tuple[ir.Node, ...]
    value: ir.Value
    is_weight: bool


def quantised_inputs(node: ir.Node) -> Iterator[tuple[int, Source]]:
    """Which inputs of a layer are quantised, by position, and where they come from."""
    for index, value in enumerate(node.inputs):
        producer = None if value is None else value.producer()
        shapes: list[ir.Node] = []
        while producer is not None and producer.op_type in SHAPES:
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
            yield index, Source(producer, tuple(shapes), source, quantise is None)


@dataclass(frozen=True)
class Cost:
    """Of one layer. error: root mean square of what int8 changes in the graph's output, over that of the output, over
    all probes; of several outputs that with the largest. operations: multiply-adds that it does in int8 instead."""

    error: float
    operations: int


def choose(costs: Mapping[str, Cost], budget: float) -> set[str]:
    """Layers to leave in fp32, so that the others together change the output by no more than `budget`."""
    left_out: set[str] = set()
    spent = 0.0
    for layer in sorted(costs, key=lambda name: costs[name].error ** 2 / max(1, costs[name].operations)):
        square = costs[layer].error ** 2
        if spent + square <= budget**2:
            spent += square
        else:
            left_out.add(layer)
    return left_out


def probes(cases: Sequence[Case]) -> list[Case]:
    """PROBES of the smaller half of the cases, evenly spaced over their timesteps, both ends among them."""
    smaller = sorted(cases, key=lambda case: sum(array.size for array in case.inputs.values()))
    smaller = smaller[: max(PROBES, math.ceil(len(cases) / 2))]
    smaller.sort(key=lambda case: float(np.max(case.inputs.get("timestep", 0))))
    if len(smaller) <= PROBES:
        return smaller
    return [smaller[i * (len(smaller) - 1) // (PROBES - 1)] for i in range(PROBES)]


def measure(model: ir.Model, quantised: ir.Model, cases: Sequence[Case]) -> dict[str, Cost]:
    """What int8 costs each quantised layer, by node. One evaluation of each case for every layer, on ONNX Runtime."""
    import onnxruntime

    twin, layers = _twin(model, quantised)
    if not layers:
        return {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what it says about unused weights
    outputs = len(model.graph.outputs)
    squares = {layer: [0.0] * outputs for layer in layers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.onnx"
        ir.save(twin, path, external_data="weights", size_threshold_bytes=1024)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        operations = dict.fromkeys(layers, 0)
        off = {_switch(layer): np.array(False) for layer in layers}
        for case in cases:
            found: Any = session.run(None, {**case.inputs, **off})
            exact, counts = found[:outputs], found[outputs:]
            for layer, size, length in zip(layers, counts[::2], counts[1::2], strict=True):
                operations[layer] = max(operations[layer], size.item() * length.item())
            names = [value.name or "" for value in model.graph.outputs]
            for layer in layers:
                changed: Any = session.run(names, {**case.inputs, **off, _switch(layer): np.array(True)})
                for i in range(outputs):
                    squares[layer][i] += _share(changed[i], exact[i]) / len(cases)
        del session
    return {layer: Cost(min(math.sqrt(max(squares[layer])), LOST), operations[layer]) for layer in layers}


def _share(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Energy of the difference over that of the exact output."""
    energy = float(np.square(exact, dtype=np.float64).sum())
    difference = float(np.square(found.astype(np.float64) - exact).sum())
    return difference / energy if math.isfinite(difference) and energy > 0 else LOST**2


def _switch(layer: str) -> str:
    return f"{layer}/int8"


def _twin(model: ir.Model, quantised: ir.Model) -> tuple[ir.Model, list[str]]:
    """The fp32 graph with a switch for every quantised layer: a scalar input, true for int8.

    After the graph's own outputs come two integers of each layer: how many numbers it gives, and of how many products
    each is the sum.
    """
    twin = ir.from_proto(ir.to_proto(model))
    graph = twin.graph
    exact = {node.name: node for node in graph}
    layers: list[str] = []
    for node in quantised.graph:
        own = exact.get(node.name)
        found = dict(quantised_inputs(node)) if own is not None and node.op_type in LAYERS else {}
        if own is None or not found:
            continue
        name = own.name or ""
        inputs, added = list(own.inputs), []
        for index, source in found.items():
            inputs[index] = _twin_input(graph, inputs[index], source, added)
        for i, one in enumerate(added):  # names that nothing around the branch has
            one.outputs[0].name = f"{name}/then/{i}"
        switch = ir.Value(name=_switch(name), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        graph.inputs.append(switch)
        branches = {
            "then_branch": _branch(own, inputs, added, f"{name}/then"),
            "else_branch": _branch(own, list(own.inputs), [], f"{name}/else"),
        }
        either = ir.node("If", [switch], branches, name=f"{name}/If")
        size = ir.node("Size", either.outputs)
        weight = own.inputs[1]
        assert weight is not None
        if own.op_type == "Conv":
            assert weight.shape is not None
            length = ir.node("Constant", [], {"value_int": int(np.prod(weight.shape.numpy()[1:]))})
        else:
            length = ir.node("Shape", [own.inputs[0]], {"start": -1})
        graph.insert_after(own, [either, size, length])
        for one, what in ((size, "size"), (length, "length")):
            one.outputs[0].name = f"{name}/{what}"
            one.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            one.outputs[0].shape = ir.Shape([1] if one.op_type == "Shape" else [])
            graph.outputs.append(one.outputs[0])
        _put(graph, own, either)
        layers.append(name)
    return twin, layers


def _branch(own: ir.Node, inputs: list[ir.Value | None], before: list[ir.Node], name: str) -> ir.Graph:
    """A layer, and what its inputs come from, as a branch of an If: it sees the values of the graph around it."""
    layer = ir.node(own.op_type, inputs, dict(own.attributes), name=name)
    layer.outputs[0].name = f"{name}/output"
    layer.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], layer.outputs, nodes=[*before, layer], name=name)


def _put(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Let everyone take what `new` gives instead of what `old` gave, under its name, and take `old` away."""
    before, after = old.outputs[0], new.outputs[0]
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name, after.type, after.shape = before.name, before.type, before.shape


def _twin_input(graph: ir.Graph, exact: ir.Value | None, source: Source, added: list[ir.Node]) -> ir.Value:
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
