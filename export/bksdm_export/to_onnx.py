"""Torch module -> ONNX graph, with dynamic batch, height and width, through torch.onnx's dynamo exporter.

It gives a correct dynamic graph for all four components, with half the nodes and a third of the memory of the
TorchScript exporter, so that one is not used.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op
from onnxscript import rewriter

from bksdm_export.errors import ExportError
from bksdm_export.graphs import OPSET, TIMESTEPS
from bksdm_export.wrappers import WRAPPED, any_size
from bksdm_runtime.bundle import Component

# Any sizes do: the graph is checked at others. Different from one another, so that no two axes are taken for one.
TRACED_SIZES = {"batch": 2, "height": 16, "width": 24, "image_height": 128, "image_width": 192, TIMESTEPS: 1}

# ONNX is protobuf, which cannot pass 2 GiB; and long before that a separate file of weights, mapped rather than
# parsed, halves the memory that a reader needs. Below this one file is handier.
EXTERNAL_DATA_BYTES = 32 * 1024 * 1024
EXTERNAL_DATA_SUFFIX = "_data"  # model.onnx_data, as Optimum names it

_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
}


def to_exported_program(module: torch.nn.Module, component: Component) -> torch.export.ExportedProgram:
    """Trace a wrapper (see wrappers) with every named axis of the component dynamic.

    Of the timesteps one is traced: `UNet` expands it, and ONNX's Expand takes [B] as well as [1] (see `_open_axes`).
    """
    inputs = tuple(
        torch.zeros(
            [TRACED_SIZES[axis] if isinstance(axis, str) else axis for axis in spec.axes],
            dtype=_TORCH_DTYPES[spec.dtype],
        )
        for spec in component.inputs
    )
    dynamic = tuple(
        {
            index: torch.export.Dim.DYNAMIC
            for index, axis in enumerate(spec.axes)
            if isinstance(axis, str) and axis != TIMESTEPS
        }
        for spec in component.inputs
    )
    with any_size(module), torch.no_grad(), _quiet():
        return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)


def to_onnx(program: torch.export.ExportedProgram, component: Component) -> ir.Model:
    """The graph of a traced program, with exactly the component's tensors; see `translate` and `clean`."""
    return clean(translate(program, component).model, component)


def translate(program: torch.export.ExportedProgram, component: Component) -> torch.onnx.ONNXProgram:
    """torch's own translation and onnxscript's optimizer."""
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in component.inputs],
            output_names=[spec.name for spec in component.outputs],
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
            optimize=False,
            verbose=False,
        )
    if onnx_program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    before = dict(onnx_program.model.graph.initializers)
    with _without_slices_split():
        onnx_program.optimize()  # constant folding, rewrites, unused nodes, equal initializers and subexpressions
    _release(value for name, value in before.items() if onnx_program.model.graph.initializers.get(name) is not value)
    return onnx_program


@contextmanager
def _without_slices_split() -> Iterator[None]:
    """onnxscript's rules without the one of two outputs, which it tries at every node against all others.

    It fits nothing in these graphs (the same bytes without it) and took a quarter of the translation: 59 s of CPU with
    it and 44 without, for the demo's U-Net. Where onnxscript keeps its rules elsewhere, it only takes longer."""
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    kept = tuple(rule for rule in rules if getattr(rule, "name", "") != "SlicesSplit")
    rewriter._DEFAULT_REWRITE_RULES = kept  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules  # pyright: ignore[reportPrivateUsage]


def clean(model: ir.Model, component: Component) -> ir.Model:
    """Tidy a translated model in place, and check it.

    Equal programs give equal bytes, with nothing in them of the machine that built them. Node names become module
    paths ("down_blocks.0.resnets.0.conv1/Conv"), initializer names the checkpoint's keys; values keep the names of
    the program's fx nodes.
    """
    _name_after_modules(model)
    strip(model)
    _open_axes(model, component)
    passes.CheckerPass()(model)
    return model


def save(model: ir.Model, path: Path, shared: Path | None = None) -> None:
    """Write model.onnx, and beside it model.onnx_data when the weights are large.

    shared: a graph of the same folder whose weights lie in such a file; those that this one has too are read from
    there. Of `path` itself it means that others will do so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared is not None and shared != path:
        _share(model, shared)
    elif shared == path or weight_bytes(model) > EXTERNAL_DATA_BYTES:
        ir.save(model, path, external_data=path.name + EXTERNAL_DATA_SUFFIX, size_threshold_bytes=1024)
        return
    ir.save(model, path)


def _share(model: ir.Model, shared: Path) -> None:
    """Replace every weight by its place in the other graph's file, where that holds the same bytes by the same name."""
    stored = ir.load(shared).graph.initializers
    for name, value in model.graph.initializers.items():
        there = stored[name].const_value if name in stored else None
        own = value.const_value
        if isinstance(there, ir.ExternalTensor) and own is not None and _same(there, own):
            value.const_value = there


def _same(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one.numpy(), other.numpy())


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def release(model: ir.Model) -> None:
    """Let go of a saved model's weights."""
    _release(model.graph.initializers.values())


def _release(values: Iterable[ir.Value]) -> None:
    # onnxscript's rewrite rules are global, and each keeps the last graph that it has seen, weights and all.
    for value in values:
        value.const_value = None


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(scale * Q K^T + mask) V, each [B, heads, tokens, width], in five nodes.

    torch's own translation transposes K through two reshapes whose shapes are computed while running (ten nodes more
    per attention, 320 in SD v1.4's U-Net), and scales both Q and K.
    """
    if is_causal or enable_gqa or dropout_p:
        raise ExportError(
            "the model's attention is causal, grouped or has dropout, which this export does not write: "
            "Stable Diffusion 1 and 2 have none of these"
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # Q is scaled before the product, which would pass fp16's range sooner than its factors.
    constant: Any = op.Constant(value_float=factor)
    factor_like_query: Any = op.CastLike(constant, query)
    scaled: Any = op.Mul(query, factor_like_query)
    transposed: Any = op.Transpose(key, perm=[0, 1, 3, 2])
    logits: Any = op.MatMul(scaled, transposed)  # [B, heads, tokens, tokens]
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:  # transformers 5; False is masked
        # fp16's lowest number: its exponential is 0 in both precisions, and no row is masked from end to end
        lowest: Any = op.Constant(value_float=-65504.0)
        lowest = op.CastLike(lowest, logits)
        logits = op.Where(attn_mask, logits, lowest)
    elif attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    weights: Any = op.Softmax(logits, axis=-1)
    return op.MatMul(weights, value)


# What a folded initializer was in its module: torch's Linear transposes its weight, GroupNorm unsqueezes both.
_FOLDED = {"MatMul": "weight_transposed", "Mul": "weight", "Add": "bias"}


def _module(node: ir.Node) -> str:
    """Path of the torch module that a node comes from, "" when it is the wrapper itself."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    # The last scope is the fx node's own name; the one before is the innermost module.
    module = scopes[-2] if len(scopes) > 1 else ""
    # Sizes that were read by the tracer itself stand in no module; torch calls that _empty_nn_module_stack_...
    return "" if module.startswith("_") else module.removeprefix(WRAPPED.rstrip(".")).lstrip(".")


def _name_after_modules(model: ir.Model) -> None:
    """Give nodes the path of their torch module, and weights that were folded the name of their node's module."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        module = _module(node)
        name = f"{module}/{node.op_type}" if module else node.op_type
        node.name = name if not seen[name] else f"{name}_{seen[name]}"
        seen[name] += 1
        role = _FOLDED.get(node.op_type)
        for value in node.inputs:
            if module and role and value is not None and _is_folded_weight(value):
                value.name = f"{module}.{role}"
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").removeprefix(WRAPPED)


def _is_folded_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and (value.name or "").startswith("val_") and tensor is not None and tensor.size > 1


def strip(model: ir.Model) -> None:
    """Remove what describes the building machine (stack traces with paths), and inferred shapes.

    Readers infer shapes themselves. Those left from tracing carry the traced timestep's size and names of symbols that
    differ from run to run.
    """
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.doc_string = None
    graph = model.graph
    graph.name = "graph"
    model.producer_name, model.producer_version = "bksdm", ""
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape, value.type = None, None


def _open_axes(model: ir.Model, component: Component) -> None:
    """Name the axes of inputs and outputs as the component does. Raises ValueError where the graph has others.

    That is where tracing fixed one that has a name, or where one that is fixed has another size.
    """
    for specs, values in ((component.inputs, model.graph.inputs), (component.outputs, model.graph.outputs)):
        if [spec.name for spec in specs] != [value.name for value in values]:
            raise ValueError(f"the graph's tensors are {[value.name for value in values]}, not {specs}")
        for spec, value in zip(specs, values, strict=True):
            shape = value.shape
            if shape is None or len(shape) != len(spec.axes):
                raise ValueError(f"{spec.name} is {shape} in the graph, not {spec.axes}")
            for axis, found in zip(spec.axes, shape, strict=True):
                if axis != TIMESTEPS and (isinstance(found, int) if isinstance(axis, str) else found != axis):
                    raise ValueError(f"{spec.name} is {shape} in the graph, not {spec.axes}")
            value.shape = ir.Shape(spec.axes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about itself, and nothing else."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(_not_about_torchvision)
    try:
        with warnings.catch_warnings():
            # torch.export copies its own deprecated tree specs.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        logger.removeFilter(_not_about_torchvision)


def _not_about_torchvision(record: logging.LogRecord) -> bool:
    # "torchvision is not installed. Skipping torchvision::nms": none of its operators is used here.
    return "torchvision is not installed" not in record.getMessage()
