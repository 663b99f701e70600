"""Where a graph goes wrong: its intermediate tensors against those of PyTorch, in the order of computation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from bksdm_export import to_onnx
from bksdm_export.ranges import MASK
from bksdm_export.reference import Case
from bksdm_export.verify import compare
from bksdm_runtime.bundle import Component

# Tensors fetched in one run: more are faster, and hold more memory.
_AT_ONCE = 128

Values = Iterator[tuple[ir.Value, NDArray[Any]]]


@dataclass(frozen=True)
class Divergence:
    """The first node whose output is over the tolerance. error: largest difference over largest value."""

    node: str
    error: float
    note: str = ""

    def __str__(self) -> str:
        return f"the error appears at node {self.node} ({self.note or f'{self.error:.1e} off'})"


def first_divergence(
    path: Path, module: torch.nn.Module, component: Component, case: Case, tolerance: float
) -> Divergence | None:
    """Find the first node of the graph at `path` that differs from PyTorch on one case, or None.

    module: the component's wrapper, unchanged and in fp32; component: its tensors in fp32. A second graph is made of
    it, in memory, whose nodes have the same names. Where that one is right, the two are compared node by node; where
    it has the error too, the exporter brought it in, and it is compared with the values of the traced program.
    """
    program = to_onnx.to_exported_program(module, component)
    translated = to_onnx.translate(program, component)
    traced = translated.exported_program
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "model.onnx"
        to_onnx.save(to_onnx.clean(translated.model, component), fresh)
        del program, translated
        [(name, output)] = case.outputs.items()
        found = {value.name: array for value, array in values(fresh, case, outputs_only=True)}
        if compare("", found[name], output).error <= tolerance or traced is None:
            expected = {_node(value): array for value, array in values(fresh, case)}
            return _first(values(path, case), _node, expected, tolerance)
        return _first(values(fresh, case), _name, _traced_values(traced, case), tolerance)


def values(path: Path, case: Case, *, outputs_only: bool = False) -> Values:
    """Run the graph at `path` on a case and yield the first output of every node that computes real numbers.

    In the order of computation; float16 comes as float32.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns of each output that could have been folded away
    model = ir.load(path)
    outputs = list(model.graph.outputs)
    wanted = outputs if outputs_only else [node.outputs[0] for node in model.graph]
    dtypes = {value.name: value.dtype.numpy() for value in model.graph.inputs if value.dtype is not None}
    inputs = {name: case.inputs[name or ""].astype(dtype) for name, dtype in dtypes.items()}
    probe = path.with_name("probe.onnx")  # beside the external data, which it shares
    try:
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            model.graph.outputs[:] = some
            ir.save(model, probe)
            session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
            for value, result in zip(some, session.run(None, inputs), strict=True):
                array = np.asarray(result)
                if np.issubdtype(array.dtype, np.floating):
                    yield value, array.astype(np.float32)
    finally:
        model.graph.outputs[:] = outputs
        probe.unlink(missing_ok=True)


def _first(
    found: Values, key: Callable[[ir.Value], str], expected: Mapping[str, NDArray[Any]], tolerance: float
) -> Divergence | None:
    for value, array in found:
        if key(value) in expected:
            compared = compare("", *_unmasked(array, expected[key(value)]))
            if not compared.error <= tolerance:
                return Divergence(_node(value), compared.error, compared.note)
    return None


def _unmasked(found: NDArray[Any], expected: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both without an attention mask's minus infinity, which is as large as its dtype allows."""
    if found.shape != expected.shape:
        return found, expected
    masked = expected <= -MASK
    return np.where(masked, np.float32(0), found), np.where(masked, np.float32(0), expected)


def _node(value: ir.Value) -> str:
    node = value.producer()
    return (node.name if node is not None else None) or _name(value)


def _name(value: ir.Value) -> str:
    return value.name or ""


def _traced_values(traced: torch.export.ExportedProgram, case: Case) -> dict[str, NDArray[Any]]:
    """Value of every node of a traced program, by name, computed by torch."""
    kept: dict[str, NDArray[Any]] = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                kept[n.name] = result.detach().numpy().astype(np.float32)
            return result

    with torch.no_grad():
        Keeping(traced.module()).run(*(torch.from_numpy(array) for array in case.inputs.values()))
    return kept
