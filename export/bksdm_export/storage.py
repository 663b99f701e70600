"""Weights stored in fewer bytes than they are computed in: fp32 graphs over fp16 or int8 weights.

Only matrices, tables and kernels of convolutions that are the checkpoint's own weights. Vectors (biases, norms: a
thousandth of the bytes) stay as they are, and so does every constant that is no weight: the frequencies of the timestep
embedding, rounded, turn its phase by half a radian at timestep 1000 (fp16, measured: twice the error of all weights
together). PyTorch's weights are rounded in the same way, so that the graph is held to its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from bksdm_export.ranges import FP16_MAX

_WEIGHT, _TRANSPOSED = ".weight", ".weight_transposed"
_INT8_MAX = 127  # -128 is left out: symmetric, so that the largest weight of either sign is kept


def store(model: ir.Model, storage: str) -> None:
    """Store an fp32 graph's weights as "fp16" or "int8"; the arithmetic does not change.

    Behind each comes what makes fp32 of it, a Cast or a DequantizeLinear, which runtimes fold when they load the graph.
    int8: symmetric, with a scale of its own for every output channel (row of a table).
    """
    graph = model.graph
    added: list[ir.Node] = []
    for value in list(graph.initializers.values()):
        tensor, name = value.const_value, value.name or ""
        is_weight = name.endswith((_WEIGHT, _TRANSPOSED))
        if not is_weight or tensor is None or tensor.dtype != ir.DataType.FLOAT or _is_vector(tensor.shape.numpy()):
            continue
        weights = tensor.numpy()
        if storage == "int8":
            axis = weights.ndim - 1 if name.endswith(_TRANSPOSED) else 0
            quantised, scale = _quantise(weights, axis)
            scales = ir.Value(name=f"{name}/scale", const_value=ir.Tensor(scale, name=f"{name}/scale"))
            graph.register_initializer(scales)
            node = ir.node("DequantizeLinear", [value, scales], {"axis": axis}, name=f"{name}/DequantizeLinear")
            stored = ir.Tensor(quantised, name=name)
        elif np.abs(weights).max(initial=0) <= FP16_MAX:
            node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
            stored = ir.Tensor(weights.astype(np.float16), name=name)
        else:
            continue
        node.outputs[0].name = f"{name}/fp32"
        for user, index in list(value.uses()):
            if user is not node:
                user.replace_input_with(index, node.outputs[0])
        value.const_value, value.dtype = stored, stored.dtype
        added.append(node)
    if added:
        graph.insert_before(graph[0], added)


@torch.no_grad()
def round_weights(module: torch.nn.Module, storage: str) -> None:
    """Round in place the weights that `store` stores; what PyTorch then gives is what its graph should."""
    for weight in _weights(module):
        if storage == "int8":
            quantised, scale = _quantise(weight.numpy(), 0)
            weight.copy_(torch.from_numpy(quantised * _along(scale, weight.ndim, 0)))
        elif weight.abs().max() <= FP16_MAX:
            weight.copy_(weight.half())


def _weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for name, weight in module.named_parameters():
        if name.endswith(_WEIGHT) and not _is_vector(weight.shape):
            yield weight.data


def _quantise(weights: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 of the weights' shape, and scales [C] along an axis: weights are about int8 times scale."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = (np.abs(weights).max(others) / np.float32(_INT8_MAX)).astype(np.float32)
    scale[scale == 0] = 1  # a channel of zeros
    rounded = np.rint(weights / _along(scale, weights.ndim, axis))
    return np.clip(rounded, -_INT8_MAX, _INT8_MAX).astype(np.int8), scale


def _along(scale: NDArray[np.float32], ndim: int, axis: int) -> NDArray[np.float32]:
    """[C] -> [.., C, ..] with ndim axes."""
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _is_vector(shape: Iterable[int]) -> bool:
    """Also a norm's [C, 1, 1]."""
    return sum(int(axis) > 1 for axis in shape) < 2
