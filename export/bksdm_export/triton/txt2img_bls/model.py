"""The loop of the plain layout: text encoder, U-Net and decoder are models of Triton's own backends, called by name.

One picture at a time in each instance. All of the arithmetic between the calls is the runtime package's.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import DEFAULT_SETTINGS, EngineError
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import RequestError
from bksdm_runtime.schedule import ScheduleError
from bksdm_runtime.served_request import FIELDS, Limits, filled, read
from bksdm_runtime.service import BUNDLE_FOLDER, SERVICE_ERRORS, encoded
from bksdm_runtime.tensors import to_caller, to_graph
from bksdm_runtime.tokenizer import Tokenizer

_COMPONENTS = ("text_encoder", "unet", "vae_decoder")


class Called:
    """A component as an engine (see engine.Engine) whose calls are requests to the model of its name."""

    threads = 1

    def __init__(self, name: str, bundle: bundles.Bundle, backend: str) -> None:
        self.name, self.backend = name, backend
        self.component = bundle.manifest.components[name]
        self.arithmetic = "f16" if bundle.manifest.precision == "fp16" else "f32"
        self._on_host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = to_graph(self.name, self.component, inputs)
        response = pb_utils.InferenceRequest(
            model_name=self.name,
            requested_output_names=[spec.name for spec in self.component.outputs],
            inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
            preferred_memory=self._on_host,
        ).exec()
        if response.has_error():
            raise EngineError(f"{self.name}: {response.error().message()}")
        return to_caller({tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()})


class TritonPythonModel:
    """What the Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="txt2img: %(levelname)s %(message)s")
        parameters = json.loads(args["model_config"])["parameters"]
        texts = {name: value["string_value"] for name, value in parameters.items()}
        try:
            self._limits = Limits.from_parameters(texts)
            bundle = bundles.load(Path(args["model_repository"]) / args["model_version"] / BUNDLE_FOLDER)
            tokenizer = Tokenizer.open(bundle.root / bundles.TOKENIZER_FOLDER)
        except SERVICE_ERRORS as error:
            raise pb_utils.TritonModelException(str(error)) from None
        engines = {name: Called(name, bundle, texts["backend"]) for name in _COMPONENTS}
        self._pipeline = Pipeline(bundle, DEFAULT_SETTINGS, tokenizer, engines)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        errors = pb_utils.TritonError
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            given = {name: array for name, array in tensors.items() if name in FIELDS}
            order = read(filled(given, self._limits), self._limits)
            [pixels] = self._pipeline.draw([order.request])
            output, value = encoded(self._pipeline, order, pixels)
        except (RequestError, ScheduleError) as error:
            return _refusal(str(error), errors.INVALID_ARG)
        except Exception:  # what is not caught goes to the client with paths of this machine
            logging.exception("a picture is lost")
            return _refusal("the picture is lost: the server's log says why", errors.INTERNAL)
        picture = value if isinstance(value, np.ndarray) else np.array([value], np.object_)
        seed = np.array([order.request.seed], np.uint64)
        return pb_utils.InferenceResponse([pb_utils.Tensor(output, picture), pb_utils.Tensor("seed_used", seed)])


def _refusal(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
