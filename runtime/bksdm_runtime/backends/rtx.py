"""TensorRT-RTX (backend "tensorrt-rtx"): its plans are compiled to the end on the GPU, when a shape first runs."""

from __future__ import annotations

import logging
from typing import Any, cast

import tensorrt_rtx  # pyright: ignore[reportMissingTypeStubs]

from bksdm_runtime.backends.plan_engine import PlanEngine, open_plan
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.compiled_cache import Entry
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.plans import Plan

library = cast(Any, tensorrt_rtx)

log = logging.getLogger(__name__)


class RTXContexts:
    """See `loaded_plan.Contexts`. What is compiled for a shape is kept in the compiled cache, where one is wanted."""

    def __init__(self, plan: Plan, settings: EngineSettings) -> None:
        folder = settings.compiled_cache
        self._entry = None if folder is None else Entry.of(folder, backend="tensorrt-rtx", plan=plan.sha256)
        self._cache: Any = None
        self._kept: bytes = b""

    def new(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        # By default a shape's own kernels are compiled beside its first runs: a CUDA graph would keep the others.
        strategies = library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        if self._entry is not None:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                kept = self._entry.read()
                if kept is not None and not self._cache.deserialize(kept.tobytes()):
                    log.warning("what TensorRT-RTX compiled before does not fit here, it is compiled anew")
            config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def ran(self) -> None:
        if self._entry is None or self._cache is None:
            return
        content = self._cache.serialize()
        if content is None:
            log.warning("what TensorRT-RTX compiled cannot be kept: it gives nothing to keep")
            return
        compiled = bytes(memoryview(content))
        if compiled != self._kept:
            self._entry.write(compiled)
            self._kept = compiled


def open_component(bundle: Bundle, component: str, settings: EngineSettings) -> PlanEngine:
    """Open one component of the bundle. Raises EngineError."""
    return open_plan(library, bundle, component, settings, RTXContexts)
