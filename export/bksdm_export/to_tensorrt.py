"""From a bundle's graphs to TensorRT engines: lint, key, build, and the plan laid beside its key."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bksdm.leftovers import scratch
from bksdm_export import tensorrt_versions
from bksdm_export.builder_process import Progress, build_apart
from bksdm_export.engine_proof import prove
from bksdm_export.errors import ExportError
from bksdm_export.graph_types import Types, check_types
from bksdm_export.plan_builder import Job
from bksdm_export.profiles import Sizes, Span, profiles, sizes
from bksdm_export.tensorrt_versions import Installed, Options
from bksdm_runtime import bundle as bundles
from bksdm_runtime import plans
from bksdm_runtime.bundle import Bundle, BundleError, file_sha256
from bksdm_runtime.compiled_cache import user_folder
from bksdm_runtime.devices import device_name
from bksdm_runtime.plans import EngineKey, Machine, Plan

log = logging.getLogger(__name__)

_PARTIAL = "building-"  # begins the name of a folder that a build uses, and a killed one leaves
_PRECISIONS = ("fp16", "fp32")


@dataclass(frozen=True)
class BuildRequest:
    """What to build of a bundle.

    library: a key of plans.LIBRARIES, None for the one that is installed. sms: compute capabilities, none for that of
    the GPU here. components: none for all. batches, heights, widths: see profiles.sizes. unguided: profiles for
    evaluations without guidance too. add: to the profiles of the engine that is there, whose flags stay. force: build
    what fits already, again.
    """

    bundle: Path
    library: str | None = None
    sms: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    batches: tuple[Span, ...] = ()
    heights: tuple[Span, ...] = ()
    widths: tuple[Span, ...] = ()
    unguided: bool = False
    add: bool = False
    options: Options = field(default_factory=Options)
    force: bool = False


@dataclass(frozen=True)
class Built:
    """A plan that is there now.

    fresh: whether it was built just now. types: what the lint counted in its graph. error: see engine_proof.prove; None
    where it was not compared.
    """

    plan: Plan
    fresh: bool
    types: Types
    error: float | None = None


def build_engines(request: BuildRequest, progress: Callable[[Progress], None] = lambda _: None) -> list[Built]:
    """Build what is missing, and return all that was asked for, in order. Each is whole as soon as it is there.

    What fails, or is killed while it builds, leaves every engine as it was. Raises ExportError, BundleError.
    """
    bundle = bundles.load(request.bundle)
    if bundle.manifest.precision not in _PRECISIONS:
        raise ExportError(
            f"engines are built of bundles of precision {' or '.join(_PRECISIONS)}, and {request.bundle} is "
            f"{bundle.manifest.precision}: export it with --precision fp16"
        )
    here = _installed(request.library)
    tensorrt_versions.check(here, request.options)
    names = _components(bundle, request.components)
    wanted = sizes(request.batches, request.heights, request.widths, bundle.manifest.model)
    model = tensorrt_versions.model(here, request.options)
    machines = [
        Machine(here.name, here.version, tensorrt_versions.target(here, sm), model) for sm in request.sms or (None,)
    ]
    types = {name: _lint(bundle, name) for name in names}
    built: list[Built] = []
    for machine in dict.fromkeys(machines):
        for name in names:
            key = _key(bundle, name, machine, wanted, request)
            plan = None if request.force else _there(bundle, key)
            if plan is None:
                progress(Progress(name, "starting"))
                plan, error = _build_proven(bundle, here, key, progress)
                built.append(Built(plan, True, types[name], error))
            else:
                built.append(Built(plan, False, types[name]))
    return built


def can_build() -> None:
    """Whether engines for the GPU of this machine can be built here. Raises ExportError, MissingLibrary."""
    here = _installed(None)
    try:
        tensorrt_versions.target(here, None)
    except ExportError as error:
        raise ExportError(f"{error}: export without --target tensorrt, and run bksdm-build where it is") from error


def _installed(name: str | None) -> Installed:
    if name is not None:
        return tensorrt_versions.installed(name)
    for one in plans.LIBRARIES:
        with contextlib.suppress(tensorrt_versions.MissingLibrary):
            return tensorrt_versions.installed(one)
    raise tensorrt_versions.MissingLibrary(
        "needs TensorRT and Polygraphy: pip install 'bksdm[tensorrt,build]', or, for a GeForce or RTX GPU, "
        "'bksdm[tensorrt-rtx,build]'"
    )


def _components(bundle: Bundle, chosen: Sequence[str]) -> tuple[str, ...]:
    has = tuple(bundle.manifest.components)
    for name in chosen:
        if name not in has:
            raise ExportError(f"bundle {bundle.root} has no {name}: choose from {', '.join(has)}")
    return tuple(name for name in has if not chosen or name in chosen)


def _lint(bundle: Bundle, name: str) -> Types:
    types = check_types(name, bundle.component_path(name), bundle.manifest.components[name])
    log.info("%s: %d nodes in float16, %d in float32", name, types.float16, types.float32)
    return types


def _key(bundle: Bundle, name: str, machine: Machine, wanted: Sequence[Sizes], request: BuildRequest) -> EngineKey:
    component, facts = bundle.manifest.components[name], bundle.manifest.model
    found = profiles(name, component, facts, wanted, unguided=request.unguided)
    key = EngineKey(name, plans.graph_sha256(bundle, name), machine, found, request.options.flags())
    if not request.add:
        return key
    # To the engine that would run here, whatever other GPUs it is for; its flags and machine stay.
    here = replace(machine, gpu=machine.gpu or device_name())
    try:
        older = plans.find(bundle, name, here).key
    except BundleError as error:
        log.warning("%s: there is nothing to add to: %s", name, error)
        return key
    both = (*older.profiles, *(profile for profile in found if profile not in older.profiles))
    return replace(older, profiles=both, flags={**older.flags, **key.flags})


def _there(bundle: Bundle, key: EngineKey) -> Plan | None:
    """The plan of exactly this key, whole; None when it has to be built."""
    path = plans.key_path(bundle, key.machine, key.component)
    if not path.is_file():
        return None
    try:
        plan = plans.read(path)
        plans.verify(plan)
    except BundleError as error:
        log.warning("%s is built again: %s", key.component, error)
        return None
    if plan.key != key:
        log.info("%s: the engine that is there has another key, it is built again", key.component)
        return None
    return plan


def _build_proven(
    bundle: Bundle, here: Installed, key: EngineKey, progress: Callable[[Progress], None]
) -> tuple[Plan, float | None]:
    """Build, and go back to what was there where the engine is wrong, or comparing it is interrupted."""
    path = plans.key_path(bundle, key.machine, key.component)
    before = path.read_bytes() if path.is_file() else None
    plan = _build(bundle, here, key, progress)
    try:
        progress(Progress(key.component, "comparing with its graph"))
        error = prove(bundle, plan)
    except BaseException:
        if before is None:
            path.unlink()
        else:
            old = path.with_suffix(".old")
            old.write_bytes(before)
            old.replace(path)
        _remove_plans(path, plans.read(path).path if before is not None else None)
        raise
    _remove_plans(path, plan.path)
    return plan, error


def _remove_plans(path: Path, kept: Path | None) -> None:
    """Plans of a key's component that no key means any more."""
    component = path.stem
    for older in path.parent.glob(f"{component}-*.plan"):
        if older != kept and re.fullmatch(rf"{component}-[0-9a-f]{{12}}\.plan", older.name):
            try:
                older.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s could not be removed (%s): delete it", older, error.strerror)


def _build(bundle: Bundle, here: Installed, key: EngineKey, progress: Callable[[Progress], None]) -> Plan:
    path = plans.key_path(bundle, key.machine, key.component)
    engines = bundle.root / bundles.ENGINES_FOLDER
    try:
        with scratch(engines, _PARTIAL) as folder:
            made = folder / "plan"
            timing = _timing_cache(here, key.machine)
            job = Job(
                library=here.name,
                graph=str(bundle.component_path(key.component)),
                plan=str(made),
                sm=key.machine.sm,
                profiles=key.profiles,
                options=Options.of(key.flags),
                timing=None if timing is None else str(timing),
            )
            started = time.perf_counter()
            peak = build_apart(job, key.component, folder, progress)
            seconds = time.perf_counter() - started
            sha256 = file_sha256(made)
            # Under a name of its own content: an older key goes on meaning an older plan until the new key is there.
            plan = path.with_name(f"{key.component}-{sha256[:12]}.plan")
            path.parent.mkdir(exist_ok=True)
            result = Plan(key, plan, made.stat().st_size, sha256, round(seconds, 1), peak)
            (folder / "key").write_text(result.to_json(), encoding="utf-8")
            made.replace(plan)
            (folder / "key").replace(path)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ExportError(f"{key.component} is not built: {error.strerror or error}{where}") from error
    return result


def _timing_cache(here: Installed, machine: Machine) -> Path | None:
    """A file in the user's cache, for all bundles: layers of one shape are timed once."""
    if not tensorrt_versions.keeps_timings(here):
        return None
    folder = user_folder().parent / "timings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no timing cache is kept: %s cannot be written: %s", folder, error.strerror)
        return None
    return folder / f"{machine.folder}.cache"
