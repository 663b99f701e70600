"""A model repository for NVIDIA's Triton Inference Server, from a bundle: written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bksdm_export import triton_bls, triton_config
from bksdm_export.errors import ExportError
from bksdm_export.folder import check_space, check_target, resolve, whole_or_nothing
from bksdm_export.triton_config import CORE, FRONT, Serving
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.pipeline import Images, Pipeline, Step
from bksdm_runtime.preview import Preview, fit
from bksdm_runtime.request import Request, RequestError, check_size
from bksdm_runtime.served_request import Limits, LimitsError
from bksdm_runtime.service import BUNDLE_FOLDER, PREVIEW_FILE

MARKER = f"{FRONT}/config.pbtxt"  # what tells a repository from any other folder
LAYOUTS = ("core", "bls")
_MODELS = Path(__file__).parent / "triton"
# Half of them are what the preview is fitted to, the others what its error is measured on. A latent pixel is one
# equation of it, with five unknowns: pictures of this size at most have hundreds.
_PREVIEWED = ("a red apple", "a blue car on a road", "a cat in the grass", "a house by the sea at night")
_PREVIEW_STEPS, _PREVIEW_SIDE = 8, 256


@dataclass(frozen=True)
class RepositoryRequest:
    """What `bksdm-triton` is asked for. sizes: height and width of each; () for the model's own.

    steps: of a request that does not say, max_steps at most. link: files of the bundle are hard links, not copies.
    layout: one of LAYOUTS; "bls" is triton_bls's, of `engines` (see triton_bls.choose_graphs), and fits no preview.
    The rest: see triton_config.Serving.
    """

    bundle: Path
    output: Path
    sizes: tuple[tuple[int, int], ...] = ()
    max_steps: int = 100
    steps: int = 25
    slots: int = 8
    fronts: int = 12
    max_queue: int = 64
    queue_seconds: float = 60.0
    backend: str = "auto"
    threads: int = 0
    link: bool = False
    force: bool = False
    layout: str = "core"
    engines: str | None = None
    settings: EngineSettings = field(default_factory=EngineSettings)


def check_repository(output: Path, *, force: bool) -> None:
    """Refuse a folder that must not be replaced. Raises ExportError."""
    check_target(output, force=force, marker=MARKER)


def write_repository(
    request: RepositoryRequest, progress: Callable[[str], None] = lambda stage: None
) -> Preview | None:
    """Write the repository, and give the map of its previews, which says how good it is; layout "bls" has none.

    settings: of the engines that draw the pictures which the preview is fitted to. Raises ExportError, BundleError,
    EngineError.
    """
    check_repository(request.output, force=request.force)
    progress("verifying the bundle")
    bundle = bundles.load(request.bundle)
    if resolve(request.output).is_relative_to(bundle.root):
        raise ExportError(f"{request.output} lies in the bundle: choose another --output")
    serving = _serving(request, bundle)
    if request.layout == "bls":
        _write_bls(request, bundle, serving, progress)
        return None
    progress("fitting the preview")
    preview = fit_preview(Pipeline.open(bundle, request.settings))
    with whole_or_nothing(request.output, force=request.force, marker=MARKER) as folder:
        if not request.link:
            check_space(folder, sum(path.stat().st_size for path in bundle.root.rglob("*") if path.is_file()))
        progress("writing the repository")
        _write_front(folder / FRONT, serving)
        _write_core(folder / CORE, serving, preview)
        copy = _link if request.link else shutil.copy2
        shutil.copytree(bundle.root, folder / CORE / "1" / BUNDLE_FOLDER, copy_function=copy)
    return preview


def _write_bls(request: RepositoryRequest, bundle: Bundle, serving: Serving, progress: Callable[[str], None]) -> None:
    graphs = triton_bls.choose_graphs(bundle, serving, request.engines)
    with whole_or_nothing(request.output, force=request.force, marker=MARKER) as folder:
        progress(f"writing the repository, of {graphs.backend} models")
        copy = _link if request.link else shutil.copy2
        target = folder / FRONT / "1" / BUNDLE_FOLDER
        without = shutil.ignore_patterns(bundles.ENGINES_FOLDER)
        shutil.copytree(bundle.root, target, copy_function=copy, ignore=without)
        triton_bls.write_models(folder, bundle, serving, graphs, _MODELS / "txt2img_bls" / "model.py")


def _serving(request: RepositoryRequest, bundle: Bundle) -> Serving:
    model = bundle.manifest.model
    sizes = request.sizes or ((model.height, model.width),)
    try:
        for height, width in sizes:
            check_size("height", height, model.size_multiple)
            check_size("width", width, model.size_multiple)
        limits = Limits(
            tuple(dict.fromkeys(sizes)),
            request.max_steps,
            min(request.steps, request.max_steps),
            model.guidance_scale,
        )
        for height, width in sizes:
            Request("", height=height, width=width)
    except (RequestError, LimitsError) as error:
        raise ExportError(str(error)) from None
    return Serving(
        limits,
        slots=request.slots,
        fronts=request.fronts,
        max_queue=request.max_queue,
        queue_seconds=request.queue_seconds,
        backend=request.backend,
        threads=request.threads,
    )


def fit_preview(pipeline: Pipeline) -> Preview:
    """The map from latents to colours, by pictures that the model itself draws. Raises EngineError."""
    model = pipeline.bundle.manifest.model
    largest = max(model.size_multiple, _PREVIEW_SIDE // model.size_multiple * model.size_multiple)
    height, width = min(model.height, largest), min(model.width, largest)
    requests = [
        Request(prompt, seed=seed, steps=_PREVIEW_STEPS, sampler="dpmsolver++", height=height, width=width)
        for seed, prompt in enumerate(_PREVIEWED)
    ]
    latents, pictures = [], []
    for request in requests:
        for item in pipeline.generate([request]):
            if isinstance(item, Step) and item.index == item.total - 1:
                latents.append(item.latents[0])
            elif isinstance(item, Images):
                pictures.append(item.pixels[0])
    try:
        return fit(latents, pictures)
    except ValueError as error:
        raise EngineError(f"the preview cannot be fitted: {error}") from error


def _write_front(folder: Path, serving: Serving) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(triton_config.front(serving), encoding="utf-8")
    shutil.copyfile(_MODELS / FRONT / "model.py", folder / "1" / "model.py")


def _write_core(folder: Path, serving: Serving, preview: Preview) -> None:
    for name in ("1", "configs", "warmup"):
        (folder / name).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(triton_config.core(serving, on_gpu=True), encoding="utf-8")
    (folder / "configs" / "cpu.pbtxt").write_text(triton_config.core(serving, on_gpu=False), encoding="utf-8")
    for name, content in triton_config.warm_up_files(serving.limits).items():
        (folder / "warmup" / name).write_bytes(content)
    shutil.copyfile(_MODELS / CORE / "model.py", folder / "1" / "model.py")
    (folder / "1" / PREVIEW_FILE).write_text(preview.to_json(), encoding="utf-8")


def _link(source: str, target: str) -> None:
    os.link(source, target)
