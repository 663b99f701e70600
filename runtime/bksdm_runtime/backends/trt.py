"""TensorRT (backend "tensorrt"): runs the plans that bksdm-build has made of a bundle's graphs for this GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import tensorrt  # pyright: ignore[reportMissingImports]

from bksdm_runtime.backends.plan_engine import PlanEngine, open_plan
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.plans import Plan

library = cast(Any, tensorrt)


@dataclass(frozen=True)
class TensorRTContexts:
    """See `loaded_plan.Contexts`. There is nothing to keep: such a plan is compiled to the end."""

    plan: Plan
    settings: EngineSettings

    def new(self, engine: Any) -> Any:
        return engine.create_execution_context()

    def ran(self) -> None: ...


def open_component(bundle: Bundle, component: str, settings: EngineSettings) -> PlanEngine:
    """Open one component of the bundle. Raises EngineError."""
    return open_plan(library, bundle, component, settings, TensorRTContexts)
