"""Arithmetic and storage in half precision: what may be fp16, what must stay fp32, and the measurement that says so.

The fp16 graph is the export of the module in half precision, not a conversion of the fp32 graph: torch then decides
each dtype as it does on a GPU (timestep embeddings in fp32, a mask that stays finite), and the graph is strongly typed,
as TensorRT wants it. Of the converters, onnxruntime.transformers.float16 casts by lists of operators (Resize in fp32,
the timestep embedding in fp16) and clips weights; neither comes from a measurement.

Ranges are measured and not waited for: ONNX Runtime's CPU provider computes fp16 nodes in fp32 and drops casts between
them, so that a graph may pass there and overflow on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bksdm_export.errors import ExportError
from bksdm_export.reference import Case

FP16_MAX = 65504.0
# The measured inputs are a sample of those to come: half of the range is left to them.
LIMIT = FP16_MAX / 2
# What stands for minus infinity in an attention mask is no value that arithmetic reaches.
MASK = 3e38


@dataclass(frozen=True)
class Island:
    """A module that stays fp32 inside an fp16 graph. peak: the largest value measured inside it, past LIMIT."""

    module: str
    peak: float


@dataclass
class Ranges:
    """Largest absolute values by module path. inside: of every operation's result; outputs: of the module's own."""

    inside: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)


def measure_ranges(module: torch.nn.Module, cases: Sequence[Case]) -> Ranges:
    """Run the module in fp32 on the cases and keep how large every intermediate result becomes."""
    ranges = Ranges()
    with torch.no_grad(), _traced_paths(module, ranges) as path, _Peaks(path, ranges):
        for case in cases:
            module(*(torch.from_numpy(array) for array in case.inputs.values()))
    return ranges


def find_islands(component: str, ranges: Ranges) -> tuple[Island, ...]:
    """The smallest modules that hold every value past LIMIT and whose own outputs are within it.

    Raises ExportError where the component's output itself is not.
    """
    found: dict[str, float] = {}
    for path, peak in ranges.inside.items():
        if peak > LIMIT:
            island = path
            while island and ranges.outputs[island] > LIMIT:
                island = island.rpartition(".")[0]
            if ranges.outputs[island] > LIMIT:
                raise ExportError(
                    f"{component} cannot be fp16: its output reaches {peak:,.0f}, fp16 ends at {FP16_MAX:,.0f}"
                )
            found[island] = max(peak, found.get(island, 0.0))
    outermost = [path for path in found if not any(_contains(other, path) for other in found)]
    return tuple(
        Island(path, max(peak for inner, peak in found.items() if inner == path or _contains(path, inner)))
        for path in sorted(outermost)
    )


def to_half(module: torch.nn.Module, islands: Iterable[Island]) -> None:
    """Turn the module to fp16 in place, its islands excepted; each casts what enters and leaves it."""
    module.half()
    for island in islands:
        inner = module.get_submodule(island.module)
        inner.float()
        inner.register_forward_pre_hook(
            lambda _module, args, kwargs: (_cast(args, torch.float32), _cast(kwargs, torch.float32)), with_kwargs=True
        )
        inner.register_forward_hook(lambda _module, _args, output: _cast(output, torch.float16))


def store_fp16(model: ir.Model) -> None:
    """Store an fp32 graph's weights as fp16, each with a Cast to fp32 behind it; the arithmetic does not change.

    Runtimes fold the casts when they load the graph. Vectors (biases, norms: a thousandth of the bytes) stay as they
    are, and so does every constant that is no weight of the checkpoint: the frequencies of the timestep embedding,
    rounded, turn its phase by half a radian at timestep 1000 (measured: twice the error of all weights together).
    """
    graph = model.graph
    casts: list[ir.Node] = []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        is_weight = (value.name or "").endswith((".weight", ".weight_transposed"))
        if not is_weight or tensor is None or tensor.dtype != ir.DataType.FLOAT or _is_vector(tensor.shape.numpy()):
            continue
        weights = tensor.numpy()
        if np.abs(weights).max(initial=0) > FP16_MAX:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/Cast")
        cast.outputs[0].name = f"{value.name}/fp32"
        for user, index in list(value.uses()):
            if user is not cast:
                user.replace_input_with(index, cast.outputs[0])
        value.const_value = ir.Tensor(weights.astype(np.float16), name=value.name)
        value.dtype = ir.DataType.FLOAT16
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)


@torch.no_grad()
def round_to_fp16(module: torch.nn.Module) -> None:
    """Round in place the weights that `store_fp16` stores as fp16; what PyTorch then gives is what its graph should."""
    for name, weight in module.named_parameters():
        if name.endswith(".weight") and not _is_vector(weight.shape) and _peak(weight) <= FP16_MAX:
            weight.copy_(weight.half())


def _is_vector(shape: Iterable[int]) -> bool:
    """Also a norm's [C, 1, 1]."""
    return sum(int(axis) > 1 for axis in shape) < 2


@contextmanager
def _traced_paths(module: torch.nn.Module, ranges: Ranges) -> Iterator[list[str]]:
    """While it lasts, the list's last item is the path of the module that runs, and outputs are measured."""
    path: list[str] = []
    handles: list[Any] = []

    def enter(name: str) -> Any:
        return lambda *_: path.append(name)

    def leave(name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            path.pop()
            ranges.outputs[name] = max(_peak(output), ranges.outputs.get(name, 0.0))

        return hook

    for name, inner in module.named_modules():
        handles += [inner.register_forward_pre_hook(enter(name)), inner.register_forward_hook(leave(name))]
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


class _Peaks(TorchFunctionMode):
    """Keeps the largest absolute value of every torch call's result, under the path of the module that runs."""

    def __init__(self, path: Sequence[str], ranges: Ranges) -> None:
        super().__init__()
        self._path = path
        self._inside = ranges.inside

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._path:
            peak = _peak(result)
            if func is F.scaled_dot_product_attention:
                peak = max(peak, _largest_logit(args[0], args[1]))  # a result of its own in the graph
            self._inside[self._path[-1]] = max(peak, self._inside.get(self._path[-1], 0.0))
        return result


def _largest_logit(query: torch.Tensor, key: torch.Tensor) -> float:
    """Of Q K^T / sqrt(width), one head at a time: all of them at once are gigabytes at full size."""
    scale = query.shape[-1] ** -0.5
    heads = zip(query.flatten(0, 1), key.flatten(0, 1), strict=True)
    return max(_peak(one @ other.mT) * scale for one, other in heads)


def _peak(value: object) -> float:
    """Largest absolute value of a tensor, or of all in a tuple, list or mapping; infinite for NaN."""
    if isinstance(value, Mapping):
        return max(map(_peak, value.values()), default=0.0)
    if isinstance(value, (tuple, list)):
        return max(map(_peak, value), default=0.0)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    low, high = (float(edge) for edge in torch.aminmax(value))
    if math.isnan(low) or math.isnan(high):
        return math.inf
    return max((abs(edge) for edge in (low, high) if abs(edge) < MASK), default=0.0)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same value with every floating-point tensor in it cast."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return type(value)(**{name: _cast(one, dtype) for name, one in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(one, dtype) for one in value)
    return value


def _contains(outer: str, inner: str) -> bool:
    return inner != outer and (not outer or inner.startswith(outer + "."))
