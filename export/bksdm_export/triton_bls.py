"""The plain layout: the graphs as models of Triton's own backends, the loop between them as a Python model.

Not how pictures are best served: each evaluation crosses the server, and no two pictures share one. It is for those
who have Triton's TensorRT or ONNX Runtime backend and want no engine inside a Python process.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bksdm_export.errors import ExportError
from bksdm_export.triton_config import FRONT, PICTURE, Serving, as_output, as_parameters, front_inputs
from bksdm_runtime import plans
from bksdm_runtime.bundle import ENGINES_FOLDER, Bundle
from bksdm_runtime.contract import Component, TensorSpec
from bksdm_runtime.plans import Plan
from bksdm_runtime.served_request import shown
from bksdm_runtime.service import BUNDLE_FOLDER

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int32": "TYPE_INT32", "int64": "TYPE_INT64"}
_GUIDED_ROWS = 2


@dataclass(frozen=True)
class Graphs:
    """What runs the components: Triton's backend of that name, and each component's plan where it is tensorrt."""

    backend: str
    plans: Mapping[str, Plan]


def choose_graphs(bundle: Bundle, serving: Serving, engines: str | None) -> Graphs:
    """The bundle's TensorRT engines, or its ONNX graphs where it has none.

    engines: which of the folders below engines/, None for the only one. Raises ExportError, BundleError.
    """
    folders = sorted({path.parent.name for path in plans.built(bundle, "tensorrt")})
    if engines is None and not folders:
        return Graphs("onnxruntime", {})
    if engines is None and len(folders) > 1:
        raise ExportError(f"the bundle has engines for several machines: choose --engines {' or '.join(folders)}")
    chosen = folders[0] if engines is None else engines
    if chosen not in folders:
        raise ExportError(f"the bundle has no engines {chosen!r}: it has {', '.join(folders) or 'none of TensorRT'}")
    found = {name: _plan(bundle, chosen, name) for name in COMPONENTS}
    for height, width in serving.limits.sizes:
        _check_size(bundle, found["unet"], height, width)
    return Graphs("tensorrt", found)


def _plan(bundle: Bundle, folder: str, component: str) -> Plan:
    """A whole plan that was built from the bundle's own graph. Raises ExportError, BundleError."""
    plan = plans.read(bundle.root / ENGINES_FOLDER / folder / f"{component}.json")
    plans.verify(plan)
    if why := plan.key.misfit(plans.graph_sha256(bundle, component), plan.key.machine):
        raise ExportError(f"{plan.path} {why}: run bksdm-build again")
    return plan


def _check_size(bundle: Bundle, plan: Plan, height: int, width: int) -> None:
    model = bundle.manifest.model
    factor = model.vae_scale_factor
    shapes = {
        "sample": (_GUIDED_ROWS, model.latent_channels, height // factor, width // factor),
        "timestep": (_GUIDED_ROWS,),
        "encoder_hidden_states": (_GUIDED_ROWS, model.tokens, model.context_dim),
    }
    if plan.key.profile_for(shapes) is None:
        raise ExportError(f"{plan.path} was not built for {shown((height, width))}: choose other sizes or build again")


def write_models(root: Path, bundle: Bundle, serving: Serving, graphs: Graphs, loop: Path) -> None:
    """The four models; the bundle is in the loop's folder already. loop: the loop's code. OSError passes through."""
    for name in COMPONENTS:
        folder = root / name
        (folder / "1").mkdir(parents=True)
        component = bundle.manifest.components[name]
        plan = graphs.plans.get(name)
        (folder / "config.pbtxt").write_text(config(name, component, plan, on_gpu=True), encoding="utf-8")
        if plan is not None:
            shutil.copy2(plan.path, folder / "1" / "model.plan")
            continue
        (folder / "configs").mkdir()
        (folder / "configs" / "cpu.pbtxt").write_text(config(name, component, None, on_gpu=False), encoding="utf-8")
        copied = root / FRONT / "1" / BUNDLE_FOLDER
        for path in _files(bundle, component):
            target = "model.onnx" if path == component.path else Path(path).name
            (folder / "1" / target).hardlink_to(copied / path)  # one file in two models
    (root / FRONT / "config.pbtxt").write_text(loop_config(serving, graphs.backend), encoding="utf-8")
    shutil.copyfile(loop, root / FRONT / "1" / "model.py")


def _files(bundle: Bundle, component: Component) -> list[str]:
    """A graph and the weights that it may read, as plans.graph_sha256 counts them."""
    folder = component.path.rpartition("/")[0] + "/"
    others = [name for name in bundle.manifest.files if name.startswith(folder)]
    return [component.path, *(name for name in others if not name.endswith((".onnx", ".json")))]


def config(name: str, component: Component, plan: Plan | None, *, on_gpu: bool) -> str:
    """config.pbtxt of a component. plan: its engine; None for the ONNX graph."""
    where = "kind: KIND_GPU count: 1 gpus: [ 0 ]" if on_gpu else "kind: KIND_CPU count: 1"
    lines = [f'name: "{name}"', f'backend: "{"onnxruntime" if plan is None else "tensorrt"}"']
    if plan is not None:
        lines.insert(0, f"# built with {plan.key.machine}, and for nothing else")
        profiles = ", ".join(f'"{number}"' for number in range(len(plan.key.profiles)))
        where += f" profile: [ {profiles} ]"
    return "\n".join(
        [
            *lines,
            "max_batch_size: 0",  # the graphs' own first axis: rows of a guided picture, not requests
            *(_tensor("input", spec) for spec in component.inputs),
            *(_tensor("output", spec) for spec in component.outputs),
            f"instance_group [ {{ {where} }} ]",
            "",
        ]
    )


def loop_config(serving: Serving, backend: str) -> str:
    """config.pbtxt of the loop: each instance draws one picture at a time."""
    parameters = {**serving.limits.to_parameters(), "backend": backend, "FORCE_CPU_ONLY_INPUT_TENSORS": "yes"}
    return "\n".join(
        [
            f'name: "{FRONT}"',
            'backend: "python"',
            "max_batch_size: 0",
            *front_inputs(),
            *map(as_output, PICTURE),
            f"instance_group [ {{ kind: KIND_CPU count: {serving.slots} }} ]",
            *as_parameters(parameters),
            "",
        ]
    )


def _tensor(side: str, spec: TensorSpec) -> str:
    dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in spec.axes)
    return f'{side} [ {{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: [ {dims} ] }} ]'
