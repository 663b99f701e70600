"""An engine that has just been built, held against its own graph, which export has compared with PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bksdm_export.errors import ExportError
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.contract import INTEGERS, Component
from bksdm_runtime.devices import compute_capability
from bksdm_runtime.engine import EngineError, EngineSettings, MissingBackend, open_engine
from bksdm_runtime.plans import Plan, Profile

Array = NDArray[np.float32]  # as every floating-point output of an engine is

# The largest difference as a part of the largest value. Not measured with TensorRT: ONNX Runtime's CUDA provider
# differed by 2.9e-3 (tiny's U-Net, 512 px, tests/export/test_fuse.py). What is wrong is NaN or off by far.
ACCEPTED = 0.05
_LOWEST_VOCABULARY = 1000  # token ids that every tokenizer has

log = logging.getLogger(__name__)


def prove(bundle: Bundle, plan: Plan) -> float | None:
    """How much the plan that is in its place differs from its graph on ONNX Runtime, for the shapes it is fastest at.

    None where that cannot be told: the plan is for another GPU, or a library is missing. Raises ExportError past
    ACCEPTED.
    """
    name, machine = plan.key.component, plan.key.machine
    if compute_capability() != machine.sm:
        return None
    try:
        host = open_engine(bundle, name, EngineSettings(backend="onnxruntime"))
        built = open_engine(bundle, name, EngineSettings(backend=machine.library))
    except MissingBackend as error:
        log.warning("%s is not compared with its graph: %s", name, error)
        return None
    except EngineError as error:
        raise ExportError(f"{name}: the engine does not open, so it is not kept: {error}") from error
    inputs = draw_inputs(bundle.manifest.components[name], plan.key.profiles[0])
    try:
        found, expected = built(inputs), host(inputs)
    except EngineError as error:
        raise ExportError(f"{name}: the engine does not run, so it is not kept: {error}") from error
    errors = [_error(cast(Array, found[one]), cast(Array, wanted)) for one, wanted in expected.items()]
    worst = max(errors, key=lambda error: np.inf if np.isnan(error) else error)
    if not worst <= ACCEPTED:
        raise ExportError(
            f"{name}: the engine differs from its graph by {worst:.3g} of the largest value, accepted is {ACCEPTED:g}, "
            "so it is not kept (an fp16 layer may overflow: polygraphy debug precision finds it)"
        )
    return worst


def _error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def draw_inputs(component: Component, profile: Profile) -> Mapping[str, NDArray[np.generic]]:
    """Inputs like those of a picture in the making, the same at every call."""
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[np.generic]] = {}
    for spec in component.inputs:
        shape = profile[spec.name].fastest
        if spec.name == "timestep":
            inputs[spec.name] = np.full(shape, 501, np.dtype(spec.dtype))
        elif spec.dtype in INTEGERS:
            inputs[spec.name] = random.integers(0, _LOWEST_VOCABULARY, shape).astype(spec.dtype)
        else:
            inputs[spec.name] = np.clip(random.standard_normal(shape), -3, 3).astype(spec.dtype)
    return inputs
