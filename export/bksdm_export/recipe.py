"""The whole story of an export: checkpoint -> graphs -> proof -> bundle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from bksdm_export import bundle_files, graphs, int8_choice, memory, report
from bksdm_export import gate as gates
from bksdm_export.diagnosis import advice, first_wrong_node
from bksdm_export.errors import ExportError
from bksdm_export.folder import check_space, resolve, whole_or_nothing
from bksdm_export.graph_writer import export_graph
from bksdm_export.graphs import IN_INT8
from bksdm_export.likeness import Likeness
from bksdm_export.ranges import with_own_size
from bksdm_export.reference import (
    KEPT,
    KEPT_FOR_INT8,
    Picture,
    Reference,
    choose_sampler,
    draw,
    make_reference,
    plan,
)
from bksdm_export.report import GraphFacts
from bksdm_export.request import ExportRequest, downsample, load, round_to
from bksdm_export.verify import (
    CUDA,
    ORT,
    TOLERANCES,
    Comparison,
    Parity,
    Rounding,
    compare_picture,
    judge_pictures,
    reference_pixels,
    verify_component,
    verify_pictures,
    verify_tokenizer,
)
from bksdm_export.wrappers import wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle, BundleError
from bksdm_runtime.engine import EngineError, has_cuda, open_engine

log = logging.getLogger(__name__)


def export_variant(request: ExportRequest, progress: Callable[[str], None] = log.info) -> Path:
    """Export a model as a verified bundle and return its folder; on any failure nothing is left there.

    progress: is told of each stage as it begins. Memory peaks below 2.2 times the checkpoint's size in float32, with
    depth "quick" and a model of full size: PyTorch goes first and is freed part by part, and only then do the graphs
    run. Raises ExportError, CheckpointError.
    """
    kind = precision, storage = request.kind
    target = resolve(request.output)
    tools = bundle_files.tools()
    chosen = {} if request.int8_like is None else int8_choice.read(request.int8_like)

    with whole_or_nothing(target, force=request.force) as folder:
        progress("loading the checkpoint")
        checkpoint = load(request)
        check_space(target.parent, bundle_files.expected_bytes(checkpoint, storage))
        facts = graphs.model_facts(checkpoint)
        approximate = precision == "int8" or request.token_downsampling > 1
        pictures = plan(facts, request.depth, choose_sampler(checkpoint.scheduler_config), more=approximate)

        for_gate: gates.Pictures = ()
        if request.gate:
            progress(f"PyTorch draws {request.gate} pictures for the gate")
            for_gate = gates.draw_exact(checkpoint, request.gate)
        unrounded = None
        if storage != precision:
            progress(f"PyTorch draws a picture before the weights are rounded to {storage}")
            unrounded = draw(checkpoint, facts, pictures[0])
            round_to(checkpoint, storage)
        exact: tuple[Picture, ...] = ()
        if request.token_downsampling > 1:
            progress(f"PyTorch draws {len(pictures)} pictures with whole attention, to judge by")
            exact = tuple(draw(checkpoint, facts, picture) for picture in pictures)
            downsample(checkpoint, request.token_downsampling)
        reference = make_reference(
            checkpoint,
            facts,
            pictures,
            progress,
            features=request.step_cache,
            kept=KEPT_FOR_INT8 if precision == "int8" else KEPT,
        )
        exact = exact or reference.pictures

        bundle_files.write_all_but_graphs(checkpoint, folder)
        verify_tokenizer(checkpoint.tokenizer, folder / bundles.TOKENIZER_FOLDER)
        variant, source, licence = checkpoint.variant, checkpoint.source, checkpoint.licence
        deep = graphs.deep_channels(checkpoint) if request.step_cache else None
        components = graphs.components(facts, precision, deep=deep)
        modules = {name: wrap(checkpoint, name, features=request.step_cache) for name in components}
        del checkpoint

        exported: dict[str, GraphFacts] = {}
        for name, component in components.items():
            progress(f"{name}: PyTorch to ONNX" + " and to int8" * (precision == "int8" and name in IN_INT8))
            path = folder / component.path
            cases = reference.cases[name]
            if precision == "fp16":  # whose ranges grow with the size
                cases = with_own_size(name, cases, facts)
            shared = folder / components["unet"].path if request.step_cache and name.startswith("unet") else None
            exported[name] = export_graph(
                *(path, name, modules.pop(name), component, cases, kind, shared),
                *(request.int8_error, progress, chosen.get(name)),
            )
            memory.give_back()  # an exported program is a ring of references

        unproven = bundle_files.manifest(
            variant,
            source,
            licence,
            facts,
            components,
            tools,
            precision=precision,
            storage=storage,
            token_downsampling=request.token_downsampling,
        )
        bundle = Bundle(folder, unproven, json.loads((folder / bundles.SCHEDULER_CONFIG).read_text()), sha256="")
        parity = _compare(bundle, reference, exact, unrounded, progress)
        page = target.with_name(target.name + ".failed.html")
        if failures := parity.failures():
            report.write_failure(page, parity, exported, unproven, "; ".join(failures))
            progress("over tolerance: looking for the node where the error appears")
            why = "; ".join(
                [*failures, *first_wrong_node(request, bundle, reference, parity), *advice(request, parity)]
            )
            report.write_failure(page, parity, exported, unproven, why)
            raise ExportError(f"the graphs are not PyTorch's: {why} (pictures and figures: {page})")

        verdict = gates.judge(bundle, for_gate, ORT, progress) if request.gate else None
        progress("writing the bundle")
        figures = report.write(folder, parity, exported, unproven, verdict)
        bundle_files.write_manifest(folder, unproven, figures)
        _open(folder)
    page.unlink(missing_ok=True)  # of an earlier try
    return request.output


def _compare(
    bundle: Bundle,
    reference: Reference,
    exact: Sequence[Picture],
    unrounded: Picture | None,
    progress: Callable[[str], None],
) -> Parity:
    """Every graph and every picture against PyTorch.

    exact: its pictures without approximation; unrounded: its first one before rounding, if any.
    """
    compared = {}
    fused: dict[str, tuple[Comparison, ...]] = {}
    on_a_gpu = bundle.manifest.precision == "fp16" and _cuda_starts(bundle)
    for name, cases in reference.cases.items():
        progress(f"{name}: comparing with PyTorch ({len(cases)} cases)")
        compared[name] = verify_component(bundle, name, cases)
        if on_a_gpu:
            progress(f"{name}: comparing the fused graph with PyTorch, on the GPU")
            fused[name] = verify_component(bundle, name, cases, CUDA)
        memory.give_back()
    progress(f"drawing {len(reference.pictures)} pictures with the exported graphs")
    pictures = verify_pictures(bundle, reference)
    rounding = None
    if unrounded is not None:
        mean = compare_picture(unrounded, reference_pixels(exact[0])).mean
        rounding = Rounding(bundle.manifest.storage, mean)
    likenesses: tuple[Likeness, ...] = ()
    if bundle.manifest.precision == "int8" or bundle.manifest.token_downsampling > 1:
        progress("judging the pictures by PSNR and LPIPS")
        likenesses = judge_pictures(bundle, reference, pictures, exact)
    tolerance = TOLERANCES[bundle.manifest.precision, bundle.manifest.storage]
    return Parity(tolerance, compared, pictures, rounding, likenesses, fused)


def _cuda_starts(bundle: Bundle) -> bool:
    """Whether the fused graphs can be compared here: a GPU that does not start is no fault of theirs, and is said."""
    if not has_cuda():
        return False
    try:
        open_engine(bundle, "text_encoder", CUDA)
    except EngineError as error:
        log.warning("the graphs fused for CUDA are not compared with PyTorch: %s", error)
        return False
    return True


def _open(folder: Path) -> None:
    """Read the bundle as its users will. Raises ExportError."""
    try:
        bundles.load(folder, verify=False)  # the hashes are seconds old; everything else is checked
    except BundleError as error:
        raise ExportError(f"the bundle is not one that its reader takes: {error}") from error
