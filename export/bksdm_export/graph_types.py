"""What TensorRT would refuse in a graph's types, found before a builder starts and said by the node's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from bksdm_export.errors import ExportError
from bksdm_runtime.bundle import Component

_STANDARD = ("", "ai.onnx")
_FLOATS: Mapping[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
_NAMES: Mapping[int, str] = {**_FLOATS, onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int64"}


@dataclass(frozen=True)
class Types:
    """Nodes by the type that they give: what an fp16 graph keeps in float32 are its islands."""

    float16: int
    float32: int


def check_types(name: str, path: Path, component: Component) -> Types:
    """Infer every type of a graph. Raises ExportError, naming the first node that mixes types or is not ONNX's own.

    A strongly typed network has the graph's types and casts nothing by itself: `Add` of half and float is an error.
    """
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.domain not in _STANDARD:
            raise ExportError(
                f"{name}: node {node.name} is {node.domain}.{node.op_type}, ONNX Runtime's own operator, which "
                "TensorRT has not: build from the plain graph"
            )
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True)
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).strip().splitlines()[0].removeprefix("[ShapeInferenceError] ")
        raise ExportError(f"{name}: TensorRT would refuse its types: {reason}") from error
    for side, specs, values in (
        ("input", component.inputs, model.graph.input),
        ("output", component.outputs, model.graph.output),
    ):
        found = {value.name: _NAMES.get(value.type.tensor_type.elem_type, "another type") for value in values}
        for spec in specs:
            if found.get(spec.name) != spec.dtype:
                raise ExportError(
                    f"{name}: {side} {spec.name} is {found.get(spec.name, 'missing')}, bundle.json says {spec.dtype}"
                )
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in inferred.graph.output}
    given = Counter(
        _FLOATS[types[output]]
        for node in inferred.graph.node
        for output in node.output[:1]
        if node.op_type not in ("Constant", "Cast") and types.get(output) in _FLOATS
    )
    return Types(given["float16"], given["float32"])
