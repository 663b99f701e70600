"""A half-precision graph again, in operators of ONNX Runtime's own, for its CUDA provider.

ONNX's operators are portable, and slow there: an attention that is written out carries its weights (4096 x 4096 a head)
to memory and back several times, where one operator keeps them on the chip (FlashAttention, arXiv 2205.14135);
convolutions want channels last, and turn their input and output each time they are given them otherwise.

Measured on an H100, tiny's U-Net, 512 px, guided, fp16, as a CUDA graph, rules added one after another: 9.9 ms as
written, 7.0 with attention, 6.1 with the gated linear units, 5.3 with convolutions, 4.4 with group norms; torch.compile
("reduce-overhead", channels last) 4.1. docs/gpu.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import rewriter

from bksdm_runtime.bundle import FUSED

DOMAIN = "com.microsoft"
# What ONNX Runtime 1.31's kernels take. Past the widest head there is no fused one: the VAE's single head has 512.
_WIDEST_HEAD = 256
_GATED = (2560, 5120, 10240)
# Of Stable Diffusion's own widths; for others the kernel may refuse to run, so that they stay as written.
_NORMED = (128, 256, 320, 512, 640, 960, 1280, 1920, 2560)
_CHANNELS_LAST, _CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def fused_path(path: Path) -> Path:
    """Where the fused graph of a graph lies: beside it, reading the same file of weights."""
    return path.with_name(path.stem + FUSED)


def fuse(model: ir.Model) -> dict[str, int]:
    """Rewrite a graph of to_onnx in place; how many of each operator were made.

    The Transposes that it puts around channels-last operators are for ONNX Runtime to cancel as it loads the graph.
    """
    made = {name: rule.apply_to_model(model) for name, rule in _RULES.items()}
    passes.RemoveUnusedNodesPass()(model)
    if any(made.values()):
        model.opset_imports[DOMAIN] = 1
    return made


def _attention(
    op: Any, query: Any, key: Any, value: Any, scale: Any, split: Any, split_k: Any, split_v: Any, joined: Any
):
    heads = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    keys = op.Transpose(op.Reshape(key, split_k), perm=[0, 2, 3, 1])
    values = op.Transpose(op.Reshape(value, split_v), perm=[0, 2, 1, 3])
    weights = op.Softmax(op.MatMul(op.Mul(heads, scale), keys), axis=-1)
    return op.Reshape(op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3]), joined)


def _is(value: ir.Value, number: float) -> bool:
    """Whether it is a constant, all of whose elements are this number, up to the rounding of fp16."""
    tensor = value.const_value
    return tensor is not None and bool(np.allclose(tensor.numpy().astype(np.float64), number, rtol=1e-3, atol=0))


def _has_narrow_heads(
    _context: Any, split: ir.Value, split_k: ir.Value, split_v: ir.Value, scale: ir.Value, **_others: Any
) -> bool:
    sizes = _heads_and_width(split)
    return (
        sizes is not None
        and sizes[1] <= _WIDEST_HEAD
        and sizes == _heads_and_width(split_k) == _heads_and_width(split_v)
        and scale.const_value is not None
        and scale.const_value.size == 1
    )


def _multi_head_attention(
    op: Any, query: Any, key: Any, value: Any, scale: ir.Value, split: ir.Value, **_others: Any
) -> Any:
    sizes = _heads_and_width(split)
    assert sizes is not None
    assert scale.const_value is not None
    factor = float(scale.const_value.numpy().item())
    return op.MultiHeadAttention(query, key, value, num_heads=sizes[0], scale=factor, _domain=DOMAIN)


def _heads_and_width(split: ir.Value) -> tuple[int, int] | None:
    """From the shape [B, tokens, heads, width] that a Reshape splits the heads with; None where it is not constant."""
    if split.const_value is not None and split.const_value.size == 4:  # the text's, whose tokens are fixed
        return int(split.const_value.numpy()[2]), int(split.const_value.numpy()[3])
    node = split.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 4:
        return None
    heads, width = (None if value is None else value.const_value for value in node.inputs[2:])
    return None if heads is None or width is None else (int(heads.numpy().item()), int(width.numpy().item()))


def _gated(op: Any, x: Any, bias: Any, root: Any, one: Any, half: Any):
    """GEGLU, arXiv 2002.05202."""
    hidden, gate = op.Split(op.Add(x, bias), num_outputs=2, _outputs=["hidden", "gate"])
    return op.Mul(hidden, op.Mul(gate, op.Mul(half, op.Add(op.Erf(op.Div(gate, root)), one))))


def _is_wide_gate(
    _context: Any, bias: ir.Value, gate: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value, **_others: Any
) -> bool:
    split, tensor = gate.producer(), bias.const_value
    assert split is not None
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    last = axis == (2 if gate.shape is None else len(gate.shape) - 1)  # a feed-forward's [B, tokens, width]
    return (
        tensor is not None
        and len(tensor.shape) == 1
        and tensor.size in _GATED
        and (axis == -1 or last)
        and (_is(root, 2**0.5) and _is(one, 1) and _is(half, 0.5))
    )


def _bias_split_gelu(op: Any, x: Any, bias: Any, **_others: Any) -> Any:
    return op.BiasSplitGelu(x, bias, _domain=DOMAIN)


def _conv(op: Any, x: Any, weight: Any, bias: Any):
    return op.Conv(x, weight, bias, _outputs=["convolved"])


_WINDOW = ("kernel_shape", "pads", "strides", "dilations")


def _is_plain_2d(_context: Any, weight: ir.Value, convolved: ir.Value, **_others: Any) -> bool:
    node = convolved.producer()
    assert node is not None
    of = node.attributes
    group = of["group"].as_int() if "group" in of else 1
    padded = of["auto_pad"].as_string() if "auto_pad" in of else "NOTSET"
    is_2d = weight.shape is not None and len(weight.shape) == 4
    return is_2d and group == 1 and padded == "NOTSET" and all(name in of for name in _WINDOW)


def _nhwc_conv(op: Any, x: Any, weight: Any, bias: Any, convolved: ir.Value) -> Any:
    node = convolved.producer()
    assert node is not None
    kept = {name: node.attributes[name].as_ints() for name in _WINDOW}
    kernel = op.Transpose(weight, perm=_CHANNELS_LAST)  # folded as the graph is loaded
    out = op.NhwcConv(op.Transpose(x, perm=_CHANNELS_LAST), kernel, bias, **kept, group=1, _domain=DOMAIN)
    return op.Transpose(out, perm=_CHANNELS_FIRST)


def _group_norm(op: Any, x: Any, split: Any, ones: Any, zeros: Any, sizes: Any, weight: Any, bias: Any):
    normal = op.InstanceNormalization(op.Reshape(x, split), ones, zeros, _outputs=["normal"])
    return op.Add(op.Mul(op.Reshape(normal, sizes), weight), bias)


def _group_norm_silu(op: Any, x: Any, split: Any, ones: Any, zeros: Any, sizes: Any, weight: Any, bias: Any):
    normal = _group_norm(op, x, split, ones, zeros, sizes, weight, bias)
    return op.Mul(normal, op.Sigmoid(normal))


def _is_of_pictures(
    _context: Any, weight: ir.Value, bias: ir.Value, ones: ir.Value, zeros: ir.Value, **_others: Any
) -> bool:
    """Of [B, C, h, w], whose weight broadcasts as [C, 1, 1]; the VAE's attention norms [B, C, tokens]."""
    tensor, offset = weight.const_value, bias.const_value
    return (
        tensor is not None
        and offset is not None
        and len(tensor.shape) == 3
        and tuple(tensor.shape) == tuple(offset.shape)
        and tensor.size == tensor.shape[0]
        and tensor.size in _NORMED
        and (_is(ones, 1) and _is(zeros, 0))
    )


def _nhwc_group_norm(
    op: Any, x: Any, ones: ir.Value, normal: ir.Value, weight: Any, bias: Any, activation: int, **_others: Any
) -> Any:
    node = normal.producer()
    assert node is not None
    assert ones.const_value is not None
    # In float32, as the kernel wants them, and without the axes that broadcast them: folded as the graph is loaded.
    flat = [op.Cast(op.Reshape(one, op.Constant(value_ints=[-1])), to=ir.DataType.FLOAT) for one in (weight, bias)]
    normed = op.GroupNorm(
        op.Transpose(x, perm=_CHANNELS_LAST),
        *flat,
        epsilon=node.attributes["epsilon"].as_float(),
        groups=int(ones.const_value.size),
        activation=activation,
        channels_last=1,
        _domain=DOMAIN,
    )
    return op.Transpose(normed, perm=_CHANNELS_FIRST)


def _rule(pattern: Callable[..., Any], made: Callable[..., Any], fits: Callable[..., bool] | None = None):
    return rewriter.RewriteRule(pattern, made, fits)


_SILU, _NONE = 1, 0
# In this order: a group norm with its SiLU before one without.
_RULES: Mapping[str, Any] = {
    "MultiHeadAttention": _rule(_attention, _multi_head_attention, _has_narrow_heads),
    "BiasSplitGelu": _rule(_gated, _bias_split_gelu, _is_wide_gate),
    "NhwcConv": _rule(_conv, _nhwc_conv, _is_plain_2d),
    "GroupNorm with SiLU": _rule(
        _group_norm_silu, functools.partial(_nhwc_group_norm, activation=_SILU), _is_of_pictures
    ),
    "GroupNorm": _rule(_group_norm, functools.partial(_nhwc_group_norm, activation=_NONE), _is_of_pictures),
}
