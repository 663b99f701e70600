"""The layout that Triton's published Stable Diffusion examples have: a unary model, one picture at a time, no batching.

The same runtime, in process, as the repository's own core: what differs is how it is served.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.image import Provenance, encode_png
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request
from bksdm_runtime.version import version

BACKEND, THREADS = "onnxruntime", None


class TritonPythonModel:
    """What the Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        bundle = bundles.load(Path(args["model_repository"]) / args["model_version"] / "bundle")
        self._pipeline = Pipeline.open(bundle, EngineSettings(BACKEND, THREADS))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        values = {tensor.name(): tensor.as_numpy().item() for tensor in request.inputs()}
        model = self._pipeline.bundle.manifest.model
        asked = Request(
            values["prompt"].decode(),
            seed=values["seed"],
            steps=values["steps"],
            guidance_scale=model.guidance_scale,
            height=model.height,
            width=model.width,
        )
        [pixels] = self._pipeline.draw([asked])
        manifest = self._pipeline.bundle.manifest
        provenance = Provenance(
            self._pipeline.bundle.sha256, manifest.variant, self._pipeline.backend, manifest.precision, version()
        )
        png = encode_png(pixels, asked, provenance)
        return pb_utils.InferenceResponse([pb_utils.Tensor("png", np.array([png], np.object_))])
