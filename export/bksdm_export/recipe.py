"""The whole story of an export: checkpoint -> graphs -> proof -> bundle."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bksdm import checkpoint as checkpoints
from bksdm.checkpoint import Checkpoint
from bksdm_export import bundle_files, graphs, report, to_onnx
from bksdm_export.divergence import first_divergence
from bksdm_export.errors import ExportError
from bksdm_export.folder import check_target, whole_or_nothing
from bksdm_export.precision import ERROR_LIMIT, Island, find_islands, store_fp16, to_half
from bksdm_export.ranges import measure_ranges, with_own_size
from bksdm_export.reference import Case, Reference, make_reference, plan
from bksdm_export.report import GraphFacts
from bksdm_export.verify import TOLERANCES, Parity, verify_component, verify_pictures
from bksdm_export.wrappers import Wrapper, wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle, BundleError, Component

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how; weights, unet, revision, allow_pickle and seed as bksdm.checkpoint.load takes them.

    precision: of the graphs' arithmetic; storage: of the weights on disk, None for that of the arithmetic.
    depth: of the verification, one of reference.DEPTHS. force: replace an older bundle at `output`.
    """

    output: Path
    variant: str | None = None
    weights: str | None = None
    unet: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    seed: int = 0
    precision: str = "fp32"
    storage: str | None = None
    depth: str = "quick"
    force: bool = False


def export_variant(request: ExportRequest, progress: Callable[[str], None] = log.info) -> Path:
    """Export a model as a verified bundle and return its folder; on any failure nothing is left there.

    progress: is told of each stage as it begins. Memory peaks below 2.2 times the checkpoint's size in float32: PyTorch
    goes first and is freed part by part, and only then do the graphs run. Raises ExportError, CheckpointError.
    """
    check_target(request.output, force=request.force)
    kind = precision, storage = _kind(request)

    progress("loading the checkpoint")
    checkpoint = load(request)
    facts = graphs.model_facts(checkpoint)
    pictures = plan(facts, request.depth)

    reference = make_reference(checkpoint, facts, pictures, progress)

    with whole_or_nothing(request.output, force=request.force) as folder:
        bundle_files.write_all_but_graphs(checkpoint, folder)
        variant, source, licence = checkpoint.variant, checkpoint.source, checkpoint.licence
        modules = {name: wrap(checkpoint, name) for name in graphs.COMPONENTS}
        del checkpoint

        components = graphs.components(facts, precision)
        exported: dict[str, GraphFacts] = {}
        for name, component in components.items():
            progress(f"{name}: PyTorch to ONNX")
            path = folder / component.path
            cases = with_own_size(name, reference.cases[name], facts)
            exported[name] = export_graph(path, name, modules.pop(name), component, cases, kind)
            gc.collect()  # an exported program is a ring of references

        unproven = bundle_files.manifest(
            variant, source, licence, facts, components, precision=precision, storage=storage
        )
        bundle = Bundle(folder, unproven, json.loads((folder / bundles.SCHEDULER_CONFIG).read_text()), sha256="")
        parity = _compare(bundle, reference, progress)
        page = request.output.with_name(request.output.name + ".failed.html")
        if failures := parity.failures():
            progress("over tolerance: looking for the node where the error appears")
            why = "; ".join([*failures, *_where(request, bundle, reference, parity)])
            report.write_failure(page, parity, exported, unproven, why)
            raise ExportError(f"the graphs are not PyTorch's: {why} (pictures and figures: {page})")

        progress("writing the bundle")
        figures = report.write(folder, parity, exported, unproven)
        bundle_files.write_manifest(folder, unproven, figures)
        _open(folder)
    page.unlink(missing_ok=True)  # of an earlier try
    return request.output


def export_graph(
    path: Path, name: str, module: Wrapper, component: Component, cases: Sequence[Case], kind: tuple[str, str]
) -> GraphFacts:
    """Write one component's graph. The module is used up: in fp16 its weights are turned in place.

    cases: real inputs, in which an fp16 graph's islands are measured; kind: (precision, storage).
    """
    precision, storage = kind
    started = time.perf_counter()
    islands: tuple[Island, ...] = ()
    if precision == "fp16":
        islands = find_islands(name, measure_ranges(module, cases, ERROR_LIMIT))
        to_half(module, islands)
    model = to_onnx.to_onnx(to_onnx.to_exported_program(module, component), component)
    if storage != precision:
        store_fp16(model)
    to_onnx.save(model, path)
    seconds = time.perf_counter() - started
    facts = GraphFacts(nodes=len(model.graph), bytes=to_onnx.weight_bytes(model), seconds=seconds, islands=islands)
    to_onnx.release(model)
    return facts


def load(request: ExportRequest) -> Checkpoint:
    """The checkpoint that a request names. Raises CheckpointError."""
    return checkpoints.load(
        request.weights,
        variant=request.variant,
        revision=request.revision,
        unet=request.unet,
        allow_pickle=request.allow_pickle,
        seed=request.seed,
    )


def _compare(bundle: Bundle, reference: Reference, progress: Callable[[str], None]) -> Parity:
    """Every graph and every picture against PyTorch."""
    compared = {}
    for name, cases in reference.cases.items():
        progress(f"{name}: comparing with PyTorch ({len(cases)} cases)")
        compared[name] = verify_component(bundle, name, cases)
    progress(f"drawing {len(reference.pictures)} pictures with the exported graphs")
    pictures = verify_pictures(bundle, reference)
    return Parity(TOLERANCES[bundle.manifest.precision, bundle.manifest.storage], compared, pictures)


def _open(folder: Path) -> None:
    """Read the bundle as its users will. Raises ExportError."""
    try:
        bundles.load(folder, verify=False)  # the hashes are seconds old; everything else is checked
    except BundleError as error:
        raise ExportError(f"the bundle is not one that its reader takes: {error}") from error


def _where(request: ExportRequest, bundle: Bundle, reference: Reference, parity: Parity) -> list[str]:
    """The first node of the first wrong component where the error appears; nothing if only pictures are wrong."""
    for name, compared in parity.components.items():
        accepted = parity.tolerance.components[name]
        # Smallest first; without the batch of many timesteps, which the traced program does not take.
        wrong = [
            case
            for case, one in zip(reference.cases[name], compared, strict=True)
            if not one.error <= accepted and len(case.inputs.get("timestep", [0])) == 1
        ]
        if wrong:
            component = graphs.components(bundle.manifest.model, "fp32")[name]
            path = bundle.component_path(name)
            found = first_divergence(path, wrap(load(request), name), component, wrong[0], accepted)
            return [f"in {name} {found}" if found else f"no single node of {name} is over its tolerance"]
    return []


def _kind(request: ExportRequest) -> tuple[str, str]:
    """Precision and storage, checked. Raises ExportError."""
    precision, storage = request.precision, request.storage or request.precision
    if (precision, storage) not in TOLERANCES:
        choices = ", ".join(f"{p} stored as {s}" for p, s in TOLERANCES)
        raise ExportError(f"precision {precision} stored as {storage} is not written: choose from {choices}")
    return precision, storage
