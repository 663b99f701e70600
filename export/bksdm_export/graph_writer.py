"""One component: from a PyTorch module to a graph on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bksdm_export import fuse, int8_choice, to_onnx
from bksdm_export.graphs import IN_INT8, INT8_DECODER_SHARE, INT8_ERROR
from bksdm_export.precision import ERROR_LIMIT, Island, Sensitive, find_islands, to_half
from bksdm_export.ranges import measure_ranges
from bksdm_export.reference import Case
from bksdm_export.report import GraphFacts
from bksdm_export.storage import store
from bksdm_export.wrappers import Wrapper
from bksdm_runtime.bundle import Component

log = logging.getLogger(__name__)


def export_graph(
    path: Path,
    name: str,
    module: Wrapper,
    component: Component,
    cases: Sequence[Case],
    kind: tuple[str, str],
    shared: Path | None = None,
    int8_error: float = INT8_ERROR,
    progress: Callable[[str], None] = log.info,
    chosen: int8_choice.Choice | None = None,
) -> GraphFacts:
    """Write one component's graph. The module is used up: in fp16 its weights are turned in place.

    cases: real inputs, in which an fp16 graph's islands are measured and on which an int8 one is calibrated; kind:
    (precision, storage); shared: the U-Net's graph, whose file of weights a shallow one reads too; int8_error: as
    quantise takes it; chosen: what to leave out of int8, instead of measuring.
    """
    precision, storage = kind
    started = time.perf_counter()
    islands: tuple[Island, ...] = ()
    if precision == "fp16":
        islands = find_islands(name, measure_ranges(module, cases, ERROR_LIMIT))
        to_half(module, islands)
    model = to_onnx.to_onnx(to_onnx.to_exported_program(module, component), component)
    sensitive: tuple[Sensitive, ...] = ()
    own = "fp32" if precision == "int8" and name not in IN_INT8 else precision
    if own == "int8":
        from bksdm_export.quantise import quantise  # NNCF: an extra of its own

        exact = model
        share = INT8_DECODER_SHARE if name == "vae_decoder" else 1
        model, sensitive = quantise(name, exact, cases, int8_error * share, progress, chosen and chosen.layers)
        to_onnx.release(exact)
    elif storage != precision:
        store(model, storage)
    to_onnx.save(model, path, path if precision == "fp16" and shared is None else shared)
    nodes, weights = len(model.graph), to_onnx.weight_bytes(model)
    if precision == "fp16":  # a GPU's
        made = fuse.fuse(model)
        log.info("%s: fused for ONNX Runtime's CUDA provider: %s", name, made)
        to_onnx.save(model, fuse.fused_path(path), shared or path)
    source = chosen.source if chosen is not None and own == "int8" else None
    facts = GraphFacts(nodes, weights, time.perf_counter() - started, own, islands, sensitive, source)
    to_onnx.release(model)
    return facts
