"""The whole story of an export: checkpoint -> graphs -> proof -> bundle."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bksdm import checkpoint as checkpoints
from bksdm import lora
from bksdm.checkpoint import Checkpoint
from bksdm_export import bundle_files, fuse, graphs, int8_choice, memory, report, to_onnx
from bksdm_export import gate as gates
from bksdm_export.divergence import Divergence, first_divergence
from bksdm_export.errors import ExportError
from bksdm_export.folder import check_space, resolve, whole_or_nothing
from bksdm_export.graphs import DEPTHS, IN_INT8, INT8_DECODER_SHARE, INT8_ERROR, LARGEST_DOWNSAMPLING, PRECISIONS
from bksdm_export.likeness import Likeness
from bksdm_export.precision import (
    ERROR_LIMIT,
    Island,
    Sensitive,
    find_islands,
    to_half,
)
from bksdm_export.ranges import measure_ranges, with_own_size
from bksdm_export.reference import (
    KEPT,
    KEPT_FOR_INT8,
    Case,
    Picture,
    Reference,
    choose_sampler,
    draw,
    make_reference,
    plan,
    samples,
)
from bksdm_export.report import GraphFacts
from bksdm_export.storage import round_weights, store
from bksdm_export.token_downsampling import downsample_tokens
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
from bksdm_export.wrappers import Wrapper, wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle, BundleError, Component
from bksdm_runtime.engine import EngineError, has_cuda, open_engine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how; weights, unet, revision, allow_pickle and seed as bksdm.checkpoint.load takes them.

    loras: files with the scale of each, merged in this order; lora_partial: as bksdm.lora.merge takes it.
    precision: of the graphs' arithmetic; storage: of the weights on disk, None for that of the arithmetic.
    step_cache: the U-Net gives its deep features, and a shallow one that takes them lies beside it.
    token_downsampling: keys and values of the outermost self-attentions come from every so many-th token; 1 is exact.
    int8_error: what int8 may change in the U-Net's output, see quantise; layers stay fp32 to keep to it. The decoder
    keeps to INT8_DECODER_SHARE of it. int8_like: an int8 bundle, or its parity.json, whose choice of layers is taken
    instead of measuring; what it does not have is measured.
    depth: of the verification, one of DEPTHS. gate: of so many pictures, see bksdm_export.gate; 0 for none.
    force: replace an older bundle at `output`; of a link, the one that it names. Raises ExportError for a choice that
    there is not.
    """

    output: Path
    variant: str | None = None
    weights: str | None = None
    unet: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    seed: int = 0
    loras: tuple[tuple[str, float], ...] = ()
    lora_partial: bool = False
    precision: str = "fp32"
    storage: str | None = None
    step_cache: bool = False
    token_downsampling: int = 1
    int8_error: float = INT8_ERROR
    int8_like: Path | None = None
    depth: str = "quick"
    gate: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        for name, found, choices in (
            ("precision", self.precision, PRECISIONS),
            ("storage", self.kind[1], PRECISIONS),
            ("verification depth", self.depth, DEPTHS),
        ):
            if found not in choices:
                raise ExportError(f"there is no {name} {found!r}: choose from {', '.join(choices)}")
        if not self.int8_error > 0:
            raise ExportError(f"an int8 error of {self.int8_error:g} cannot be kept to: take one above 0")
        if not 1 <= self.token_downsampling <= LARGEST_DOWNSAMPLING:
            raise ExportError(
                f"token downsampling is by 1 (none) to {LARGEST_DOWNSAMPLING}, not by {self.token_downsampling}"
            )
        precision, storage = self.kind
        if self.kind not in TOLERANCES:
            choices = ", ".join(f"{p} stored as {s}" for p, s in TOLERANCES)
            raise ExportError(f"precision {precision} stored as {storage} is not written: choose from {choices}")

    @property
    def kind(self) -> tuple[str, str]:
        """Precision and storage."""
        return self.precision, self.precision if self.storage is None else self.storage


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
            _round(checkpoint, storage)
        exact: tuple[Picture, ...] = ()
        if request.token_downsampling > 1:
            progress(f"PyTorch draws {len(pictures)} pictures with whole attention, to judge by")
            exact = tuple(draw(checkpoint, facts, picture) for picture in pictures)
            _downsample(checkpoint, request.token_downsampling)
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
            why = "; ".join([*failures, *_where(request, bundle, reference, parity), *_advice(request, parity)])
            report.write_failure(page, parity, exported, unproven, why)
            raise ExportError(f"the graphs are not PyTorch's: {why} (pictures and figures: {page})")

        verdict = gates.judge(bundle, for_gate, ORT, progress) if request.gate else None
        progress("writing the bundle")
        figures = report.write(folder, parity, exported, unproven, verdict)
        bundle_files.write_manifest(folder, unproven, figures)
        _open(folder)
    page.unlink(missing_ok=True)  # of an earlier try
    return request.output


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


def _advice(request: ExportRequest, parity: Parity) -> list[str]:
    advice: list[str] = []
    if any(one.failures() for one in parity.likenesses):
        if request.int8_like is not None:
            advice.append("without --int8-like the layers to leave in fp32 are measured")
        elif request.precision == "int8":
            advice.append(f"an --int8-error below {request.int8_error:g} leaves more layers in fp32")
        if request.token_downsampling > 1:
            advice.append(f"a --token-downsampling below {request.token_downsampling} leaves more tokens to attend to")
    return advice


def load(request: ExportRequest) -> Checkpoint:
    """The checkpoint that a request names, its LoRAs merged. Raises CheckpointError."""
    whole = checkpoints.load(
        request.weights,
        variant=request.variant,
        revision=request.revision,
        unet=request.unet,
        allow_pickle=request.allow_pickle,
        seed=request.seed,
    )
    for file, scale in request.loras:
        whole = lora.merge(whole, Path(file), scale, partial=request.lora_partial)
    return whole


def _round(checkpoint: Checkpoint, storage: str) -> None:
    for model in (checkpoint.text_encoder, checkpoint.unet, checkpoint.vae):
        round_weights(model, storage)


def _downsample(checkpoint: Checkpoint, factor: int) -> None:
    if factor > 1 and not downsample_tokens(checkpoint.unet, factor):
        raise ExportError("the model's outermost stages have no self-attention: leave out --token-downsampling")


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


def _where(request: ExportRequest, bundle: Bundle, reference: Reference, parity: Parity) -> list[str]:
    """The first node of the first wrong component where the error appears; nothing if only pictures are wrong.

    A search that fails is said, and hides nothing: what is over its tolerance stands before it.
    """
    for name, compared in parity.components.items():
        if bundle.manifest.precision == "int8" and name in IN_INT8:
            continue  # every node differs
        accepted = parity.tolerance.components[name]
        wrong = [case for case, one in zip(reference.cases[name], compared, strict=True) if not one.error <= accepted]
        if wrong:
            try:
                found = _search(request, bundle, name, wrong[0], accepted)
            except Exception as error:  # torch's and onnxruntime's own kinds; a graph that cannot run ends here
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                return [f"the node in {name} was not found ({reason:.200})"]
            return [f"in {name} {found}" if found else f"no single node of {name} is over its tolerance"]
    return []


def _search(request: ExportRequest, bundle: Bundle, name: str, case: Case, accepted: float) -> Divergence | None:
    checkpoint = load(request)
    if bundle.manifest.storage != bundle.manifest.precision:
        _round(checkpoint, bundle.manifest.storage)
    _downsample(checkpoint, request.token_downsampling)
    component = graphs.components(bundle.manifest.model, "fp32", deep=graphs.deep_channels(checkpoint))[name]
    module = wrap(checkpoint, name, features=request.step_cache)
    for one in samples(case):  # one at a time: the traced program takes a single timestep
        if found := first_divergence(bundle.component_path(name), module, component, one, accepted):
            return found
    return None
