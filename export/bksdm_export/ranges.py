"""What fp16 would do to a module, measured in fp32 on real inputs: how large values become, and what rounding costs.

Both are measured in one pass, operation by operation, and belong to the module that runs: ONNX Runtime's CPU provider
computes fp16 nodes in fp32 and drops casts between them, so that a graph may pass there and fail on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bksdm_export.reference import Case
from bksdm_runtime.bundle import ModelFacts

FP16_MAX = 65504.0
# What stands for minus infinity in an attention mask is no value that arithmetic reaches.
MASK = 3e38
# Numbers of an attention's logits that are computed at once, 64 MB of them: all are 17 GB with eight heads at 1024 px.
_BLOCK = 2**24


@dataclass
class Ranges:
    """Figures by module path. Errors are the largest difference as a part of the largest value of the same tensor.

    inside: the largest absolute value of the results of the module's own operations.
    outputs: that of what the module returns; lists of modules are never called, and are not among them.
    errors: what fp16 costs the worst of the module's own operations that have weights, norms too, and attentions:
        inputs and weights rounded to fp16, sums in fp32, the result rounded. Of other operations none is measured.
    edges: what is left of that where the module computes in fp32 and only what enters and leaves it is rounded;
        measured for modules around an operation that costs more than was accepted.
    """

    inside: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    edges: dict[str, float] = field(default_factory=dict)


def measure_ranges(module: torch.nn.Module, cases: Sequence[Case], accepted: float = math.inf) -> Ranges:
    """Run the module in fp32 on the cases, and keep what becomes of its values there and would become in fp16.

    accepted: what fp16 may cost an operation; past it `Ranges.edges` are measured, outwards to the first module whose
    edges cost no more. Every operation runs twice; modules around a costly one run again.
    """
    meter = _Meter(accepted)
    with torch.no_grad(), meter.hooked(module), meter:
        for case in cases:
            module(*(torch.from_numpy(array) for array in case.inputs.values()))
    return meter.ranges


def with_own_size(component: str, cases: Sequence[Case], facts: ModelFacts) -> tuple[Case, ...]:
    """The cases, and where none has the size of the model's own pictures, the first and last of the largest at it.

    Those are single samples, continued by their mirror image, and unlike the others they have no outputs. Memory at
    512 px, measured with tiny's architecture: 0.3 GB beside the U-Net's weights, 1.5 GB beside the VAE decoder's, when
    the U-Net's are freed: neither is the peak of an export.
    """
    factor = 1 if component == "vae_encoder" else facts.vae_scale_factor
    own = facts.height // factor, facts.width // factor
    sizes = [_spatial(case) for case in cases]
    largest = max(sizes, key=math.prod, default=())
    if not largest or any(size[0] >= own[0] and size[1] >= own[1] for size in sizes):
        return tuple(cases)
    of_largest = [case for case, size in zip(cases, sizes, strict=True) if size == largest]
    chosen = of_largest[:1] + of_largest[1:][-1:]
    return (*cases, *(at_size(case, *own) for case in chosen))


def at_size(case: Case, height: int, width: int) -> Case:
    """The last sample of a case, continued by its mirror image (or cut) to a size, which is in its own units."""
    inputs = {name: _mirrored(array[-1:], (height, width)) for name, array in case.inputs.items()}
    return Case(f"{case.label}, at {height}x{width}", inputs, {})


def _spatial(case: Case) -> tuple[int, ...]:
    """(height, width) of the input that has them; () where none has."""
    return next((array.shape[2:] for array in case.inputs.values() if array.ndim == 4), ())


def _mirrored(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if array.ndim != 4:
        return array
    missing = [max(0, new - old) for new, old in zip(size, array.shape[2:], strict=True)]
    padded = np.pad(array, [(0, 0), (0, 0), *((0, one) for one in missing)], mode="symmetric")
    return np.ascontiguousarray(padded[:, :, : size[0], : size[1]])


class _Meter(TorchFunctionMode):
    """Sees every torch call of a module, and measures it for the module that runs."""

    def __init__(self, accepted: float) -> None:
        super().__init__()
        self.ranges = Ranges()
        self._accepted = accepted
        self._path: list[str] = []  # of the modules that run, the innermost last
        self._costly: set[str] = set()  # modules past `accepted`, as long as no module with exact edges is around them
        self._paused = False  # while the meter itself calls

    @contextmanager
    def hooked(self, module: torch.nn.Module) -> Iterator[None]:
        """While it lasts, the meter knows which module runs, and measures what each returns."""
        handles: list[Any] = []
        for name, inner in module.named_modules():
            handles.append(inner.register_forward_pre_hook(self._enter(name)))
            handles.append(inner.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._path and not self._paused:
            peak, error = _peak(result), 0.0
            if func is F.scaled_dot_product_attention:
                logit, error = _attention(result, *args, **kwargs)
                peak = max(peak, logit)  # a result of its own in the graph
            elif any(isinstance(one, torch.nn.Parameter) for one in (*args, *kwargs.values())):
                error = _error(_rounded(func(*_rounded(args), **_rounded(kwargs))), result)
            _keep(self.ranges.inside, self._path[-1], peak)
            _keep(self.ranges.errors, self._path[-1], error)
            if error > self._accepted:
                self._costly.add(self._path[-1])
        return result

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._paused:
                self._path.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._paused:
                return
            self._path.pop()
            self._paused = True
            try:
                _keep(self.ranges.outputs, name, _peak(output))
                if inside := {path for path in self._costly if within(path, name)}:
                    # One axis is that of timesteps, which stay fp32.
                    halves = module.forward(*_rounded(args, axes=2), **_rounded(kwargs, axes=2))
                    edges = _error(_rounded(halves), output)
                    _keep(self.ranges.edges, name, edges)
                    if edges <= self._accepted or not name:
                        self._costly -= inside
            finally:
                self._paused = False

        return hook


def within(path: str, module: str) -> bool:
    """Whether a module's path is that of another, or of a module inside it."""
    return not module or path == module or path.startswith(module + ".")


def _attention(
    result: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[float, float]:
    """The largest logit of an attention, and its error where every step of it is rounded as in our graph.

    query, key, value and result: [B, heads, tokens, width]. One head and a block of queries at a time.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:2], query.shape[-2], key.shape[-2]).flatten(0, 1)
    rows = max(1, _BLOCK // key.shape[-2])
    logit = difference = 0.0
    for head, (one, other, values, exact) in enumerate(
        zip(*(each.flatten(0, 1) for each in (query, key, value, result)), strict=True)
    ):
        scaled, other, values = _rounded(_rounded(one) * factor), _rounded(other), _rounded(values)
        for start in range(0, len(scaled), rows):
            block = slice(start, start + rows)
            logits = scaled[block] @ other.mT
            logit = max(logit, _peak(logits))
            logits = _rounded(logits)
            if attn_mask is not None:
                mask = attn_mask[head, block]
                logits = logits.masked_fill(~mask, -FP16_MAX) if mask.dtype == torch.bool else logits + mask
            found = _rounded(_rounded(logits.softmax(-1)) @ values)
            difference = max(difference, _peak(found - exact[block]))
    return logit, _part(difference, _peak(result))


def _error(found: Any, exact: Any) -> float:
    """Largest difference over largest value of the first tensor of what a call returned. Overwrites `found`."""
    while isinstance(exact, (tuple, list, Mapping)) and exact:
        found, exact = (next(iter(each.values() if isinstance(each, Mapping) else each)) for each in (found, exact))
    if not isinstance(exact, torch.Tensor) or not exact.is_floating_point():
        return 0.0
    return _part(_peak(found.sub_(exact)), _peak(exact))


def _part(difference: float, largest: float) -> float:
    if not math.isfinite(largest):
        return 0.0  # wrong in fp32 already, which `Ranges.inside` says
    return difference / largest if largest else difference


def _rounded(value: Any, axes: int = 0) -> Any:
    """Copied through fp16 where it is a floating-point tensor of so many axes.

    Past fp16's end stands the end itself, so that the error of an overflow is a number.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or value.ndim < axes:
            return value
        return value.half().float().clamp_(-FP16_MAX, FP16_MAX)
    if isinstance(value, Mapping):
        return {name: _rounded(one, axes) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_rounded(one, axes) for one in value]
    return value


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


def _keep(figures: dict[str, float], path: str, figure: float) -> None:
    figures[path] = max(figure, figures.get(path, 0.0))
