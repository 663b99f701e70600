"""What `bksdm-run` does once its flags are read: open the bundle, make the pictures, show progress, save them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.checks import check
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.image import ImageError, Provenance, make_folder, read_request, refuse_unwritable, save_png
from bksdm_runtime.manifest import Manifest
from bksdm_runtime.naming import NamingError, targets
from bksdm_runtime.pipeline import Images, Pipeline, Step
from bksdm_runtime.request import Request, RequestError
from bksdm_runtime.schedule import ScheduleError, StepsError
from bksdm_runtime.tokenizer import TokenizerError
from bksdm_runtime.version import version

# What a user can cause: each message is one sentence, and no traceback belongs to it.
USER_ERRORS = (BundleError, EngineError, ImageError, NamingError, RequestError, ScheduleError, TokenizerError)
MISUSE = (NamingError, RequestError, StepsError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """One run of the command.

    bundle: None for $BKSDM_BUNDLE or the demo. output: what -o said. keep: save only this one of the requests.
    """

    requests: tuple[Request, ...]
    bundle: Path | None
    output: str | None
    settings: EngineSettings
    batch_size: int | None
    keep: int | None = None


def order_from_png(picture: Path, bundle: Path | None, output: str | None, settings: EngineSettings) -> Order:
    """The order that makes a picture again from what it carries. Raises ImageError, BundleError on another bundle."""
    request, provenance = read_request(picture)
    folder, _ = find_bundle(bundle)
    # Every file is verified when the order is carried out; the hash of bundle.json alone tells the bundles apart.
    found = bundles.load(folder, verify=False).sha256
    if found != provenance.bundle:
        raise BundleError(
            f"{picture} was made by the bundle {provenance.bundle} ({provenance.variant}), {folder} is {found}: "
            "give the one that made it with --bundle"
        )
    if isinstance(request.init_image, Path):
        try:
            found = bundles.file_sha256(request.init_image)
        except FileNotFoundError:
            raise ImageError(
                f"{picture} was made from the picture {request.init_image}, which is not there any more"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            shown = ascii(str(request.init_image)[:100])
            raise ImageError(f"{picture} was made from the picture {shown}, which cannot be read: {reason}") from None
        if found != provenance.init_image:
            raise ImageError(f"{picture} was made from the picture {request.init_image}, which has changed since")
    if provenance.version != version():
        log.warning("%s was made by bksdm %s, this is %s: pixels may differ", picture, provenance.version, version())
    settings = _same_arithmetic(picture, provenance, settings)
    # The same company in the same batch (of itself): nothing that a backend may round differently is left.
    return Order(
        requests=(request,) * provenance.batch_size,
        bundle=folder,
        output=output,
        settings=settings,
        batch_size=provenance.batch_size,
        keep=provenance.batch_index,
    )


def _same_arithmetic(picture: Path, provenance: Provenance, settings: EngineSettings) -> EngineSettings:
    """The settings with what they leave open taken from the picture; what they change is said."""
    backend = provenance.backend if settings.backend == "auto" else settings.backend
    arithmetic = settings.arithmetic
    if backend != provenance.backend:
        log.warning("%s was made on %s: on %s pixels may differ", picture, provenance.backend, backend)
    elif arithmetic == "auto":
        arithmetic = provenance.arithmetic
    elif arithmetic != provenance.arithmetic:
        log.warning("%s was made in %s: in %s pixels may differ", picture, provenance.arithmetic, arithmetic)
    threads = provenance.threads if settings.threads is None else settings.threads
    return replace(settings, backend=backend, arithmetic=arithmetic, threads=threads)


def make(order: Order) -> Generator[Path, None, None]:
    """Make and save every picture of the order, yielding each path when its file is whole.

    Notices and progress go to stderr. Closing the generator stops between two steps. Raises USER_ERRORS.
    """
    folder, notice = find_bundle(order.bundle)
    bundle = bundles.load(folder, weights=False)
    model = bundle.manifest.model
    if notice:
        log.warning("%s (%d x %d pixels); --bundle or $BKSDM_BUNDLE picks another", notice, model.width, model.height)
    kept = range(len(order.requests)) if order.keep is None else (order.keep,)
    places = dict(zip(kept, targets(order.output, [order.requests[i] for i in kept]), strict=True))
    # All that can be refused, but for damaged weights, is so before the engines open; nothing is written before.
    batches, _ = check(bundle, order.requests, batch_size=order.batch_size)
    evaluations = len(batches[0].schedule.timesteps)  # the same for all of an order
    folders = {place.path.parent for place in places.values()}
    for folder_of_pictures in folders:
        refuse_unwritable(folder_of_pictures)
    pipeline = Pipeline.open(bundle, order.settings, verify_weights=True)
    _say_what_runs(folder, pipeline)
    log.info("%s", how_exact(order.requests[0], bundle.manifest))
    hashes = _init_image_hashes(order.requests)
    for folder_of_pictures in folders:
        make_folder(folder_of_pictures)
    count = len(kept)
    done, batch_end = 0, 0
    # Open before the first evaluation is done: at full size on a CPU that takes seconds.
    bar = _bar(evaluations, _title(1, 1, count))
    with closing(pipeline.generate(order.requests, batch_size=order.batch_size)) as items:
        try:
            for item in items:
                if isinstance(item, Step):
                    batch_end = done + len(places.keys() & set(item.positions))
                    bar.set_description_str(_title(done + 1, batch_end, count), refresh=False)
                    bar.update()
                    if item.index == item.total - 1:
                        bar.set_postfix_str("decoding")
                elif item.positions[0] in places:  # the pipeline decodes one at a time
                    bar.set_postfix_str("", refresh=False)
                    bar.close()
                    path = places[item.positions[0]].free_path()
                    _save(path, item, pipeline, hashes)
                    done += 1
                    yield path
                    if done == count:
                        return
                    if done == batch_end:
                        bar = _bar(evaluations, _title(done + 1, done + 1, count))
        finally:
            bar.close()


def how_exact(request: Request, manifest: Manifest) -> str:
    """Whether a request asks for less than exact sampling, or the bundle's U-Net is less than exact, in words."""
    saved: list[str] = []
    if manifest.token_downsampling > 1:
        saved.append(f"the outermost self-attentions see one token of {manifest.token_downsampling**2}")
    if request.cache_interval > 1:
        saved.append(f"the whole U-Net every {request.cache_interval} steps only")
    if request.guidance_interval != Request.guidance_interval:
        start, end = request.guidance_interval
        saved.append(f"guidance between {start:g} and {end:g} of the steps only")
    if request.vae_tile is not None:
        saved.append(f"decoded in tiles of {request.vae_tile} px")
    return f"not exact: {', '.join(saved)}" if saved else "exact sampling"


def find_bundle(folder: Path | None) -> tuple[Path, str]:
    """The bundle to use and a notice when nobody chose it. Raises BundleError when there is none."""
    if folder is not None:
        return folder, ""
    if chosen := os.environ.get("BKSDM_BUNDLE"):
        return Path(chosen), ""
    try:
        return bundles.demo(), "no --bundle given: this is the demo model that ships with bksdm"
    except BundleError as error:
        raise BundleError(f"no --bundle given, $BKSDM_BUNDLE is not set, and {error}") from None


def _say_what_runs(folder: Path, pipeline: Pipeline) -> None:
    model = f"{pipeline.bundle.manifest.variant}, {pipeline.bundle.manifest.precision}"
    threads = f"{pipeline.threads} thread{'' if pipeline.threads == 1 else 's'}"
    log.info("%s (%s) on %s: %s, %s", folder, model, pipeline.backend, pipeline.arithmetic, threads)


def _init_image_hashes(requests: Sequence[Request]) -> dict[Path, str]:
    paths = {request.init_image for request in requests if isinstance(request.init_image, Path)}
    try:
        return {path: bundles.file_sha256(path) for path in paths}
    except OSError as error:
        raise ImageError(f"the init image {error.filename} cannot be read: {error.strerror}") from None


def _save(path: Path, item: Images, pipeline: Pipeline, hashes: Mapping[Path, str]) -> None:
    [request], [pixels], [batch_index] = item.requests, item.pixels, item.batch_indices
    provenance = replace(
        pipeline.provenance(),
        batch_size=item.batch_size,
        batch_index=batch_index,
        init_image=hashes[request.init_image] if isinstance(request.init_image, Path) else "",
    )
    save_png(path, pixels, request, provenance)


def _title(first: int, last: int, count: int) -> str:
    which = f"image {first}" if first == last else f"images {first}-{last}"
    return f"{which} of {count}"


def _bar(evaluations: int, title: str) -> tqdm[NoReturn]:
    # disable=None: no bar where stderr is not a terminal, so that logs stay readable
    return tqdm(total=evaluations, desc=title, disable=None, dynamic_ncols=True, file=sys.stderr)
