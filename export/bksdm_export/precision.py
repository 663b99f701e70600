"""Arithmetic in half precision: what may be fp16, and what must stay fp32 because a measurement says so.

The fp16 graph is the export of the module in half precision, not a conversion of the fp32 graph: torch then decides
each dtype as it does on a GPU (timestep embeddings in fp32, a mask that stays finite), and the graph is strongly typed,
as TensorRT wants it. Of the converters, onnxruntime.transformers.float16 casts by lists of operators (Resize in fp32,
the timestep embedding in fp16) and clips weights; neither comes from a measurement. Ours is `ranges`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bksdm_export.errors import ExportError
from bksdm_export.ranges import FP16_MAX, Ranges, within

# The measured inputs are a sample of those to come: half of the range is left to them.
LIMIT = FP16_MAX / 2
# What fp16 may cost one operation, see `Ranges.errors`. Measured at most, all in the softmax of the demo's attentions,
# whose logits reach 158: 4.1e-3 in an export, 7.7e-3 at 1024 px. With random weights (the mini models, and tiny's true
# architecture at 512 px): 1.1e-3.
ERROR_LIMIT = 3e-2


@dataclass(frozen=True)
class Island:
    """A module that stays fp32 inside an fp16 graph, and the figures that say so: one of them is past its limit.

    peak: the largest value measured inside it (LIMIT); error: what fp16 costs the worst operation inside (ERROR_LIMIT).
    """

    module: str
    peak: float
    error: float


@dataclass(frozen=True)
class Sensitive:
    """A layer that stays fp32 inside an int8 graph. error: what int8 in it alone would change in the graph's output."""

    layer: str
    error: float


def find_islands(component: str, ranges: Ranges) -> tuple[Island, ...]:
    """The smallest modules that hold every operation past LIMIT or ERROR_LIMIT, and can be fp32 on their own.

    Those are modules whose own outputs are within LIMIT, and that lose no more than ERROR_LIMIT where their inputs are
    rounded: a sum that cancels is lost in its inputs, so the island must reach to where they come from.
    ranges: measured with ERROR_LIMIT accepted. Raises ExportError where not even the whole component is such a module.
    """
    found = {
        _island_around(component, path, ranges)
        for path, peak in ranges.inside.items()
        if peak > LIMIT or ranges.errors.get(path, 0.0) > ERROR_LIMIT
    }
    outermost = [path for path in found if not any(other != path and within(path, other) for other in found)]
    return tuple(
        Island(path, peak=_largest_within(path, ranges.inside), error=_largest_within(path, ranges.errors))
        for path in sorted(outermost)
    )


def _island_around(component: str, path: str, ranges: Ranges) -> str:
    # A list of modules is never called, so that nothing could be cast where it begins and ends.
    while path not in ranges.outputs or not _can_be_fp32(path, ranges):
        if not path:
            peak, edges = ranges.outputs[""], ranges.edges.get("", 0.0)
            why = (
                f"its output reaches {peak:,.0f}, fp16 ends at {FP16_MAX:,.0f}"
                if peak > LIMIT
                else f"inputs and output in fp16 alone change it by {edges:.1e} of its largest value, "
                f"accepted is {ERROR_LIMIT:.0e}"
            )
            raise ExportError(f"{component} cannot be fp16: {why}")
        path = path.rpartition(".")[0]
    return path


def _can_be_fp32(path: str, ranges: Ranges) -> bool:
    return ranges.outputs[path] <= LIMIT and ranges.edges.get(path, 0.0) <= ERROR_LIMIT


def _largest_within(island: str, figures: Mapping[str, float]) -> float:
    return max((figure for path, figure in figures.items() if within(path, island)), default=0.0)


def to_half(module: torch.nn.Module, islands: Iterable[Island]) -> None:
    """Turn the module to fp16 in place, its islands excepted; each casts what enters and leaves it.

    Nothing inside an island changes: its weights are the checkpoint's, bit for bit.
    """
    paths = [island.module for island in islands]
    for path, inner in module.named_modules():
        if any(within(path, island) for island in paths):
            continue
        for parameter in inner.parameters(recurse=False):
            parameter.data = _cast(parameter.data, torch.float16)
        for name, buffer in inner.named_buffers(recurse=False):
            setattr(inner, name, _cast(buffer, torch.float16))
        if any(within(island, path) for island in paths):
            # diffusers' VAE decoder casts to the dtype of its upper blocks' first weight, which an island may hold.
            _cast_inputs(inner, torch.float16)
    for path in paths:
        island = module.get_submodule(path)
        _cast_inputs(island, torch.float32)
        island.register_forward_hook(lambda _module, _args, output: _cast(output, torch.float16))


def _cast_inputs(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have a module cast what enters it; not what has one axis: those are timesteps, fp32 everywhere."""
    module.register_forward_pre_hook(
        lambda _module, args, kwargs: (_cast(args, dtype, axes=2), _cast(kwargs, dtype, axes=2)), with_kwargs=True
    )


def _cast(value: Any, dtype: torch.dtype, axes: int = 0) -> Any:
    """The same value with every floating-point tensor of so many axes in it cast."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim >= axes else value
    if isinstance(value, Mapping):
        return type(value)(**{name: _cast(one, dtype, axes) for name, one in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(one, dtype, axes) for one in value)
    return value
