"""The front: one answer for one request, over any of Triton's protocols. Checks it, fills in what it leaves out, and
calls the core."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from bksdm_runtime.request import RequestError
from bksdm_runtime.served_request import FIELDS, Limits, LimitsError, filled, is_unavailable

_CORE = "txt2img_core"
_OUTPUTS = {b"png": "png", b"png_b64": "png_b64", b"raw": "image"}


class TritonPythonModel:
    """What the Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="txt2img: %(levelname)s %(message)s")
        parameters = json.loads(args["model_config"])["parameters"]
        try:
            self._limits = Limits.from_parameters({name: value["string_value"] for name, value in parameters.items()})
        except LimitsError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            fields = filled({name: array for name, array in tensors.items() if name in FIELDS}, self._limits)
            return _ask(request, fields)
        except RequestError as error:
            return _refusal(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:  # what is not caught goes to the client with paths of this machine
            logging.exception("a request cannot be answered")
            return _refusal("the request cannot be answered: the server's log says why", pb_utils.TritonError.INTERNAL)


def _ask(request: Any, fields: dict[str, Any]) -> Any:
    wanted = [_OUTPUTS[fields["format"][0]], "seed_used"]
    inner = pb_utils.InferenceRequest(
        model_name=_CORE,
        request_id=request.request_id(),
        requested_output_names=wanted,
        inputs=[pb_utils.Tensor(name, array[None]) for name, array in fields.items()],  # [1, 1] each
        timeout=request.timeout(),
    )
    found: dict[str, Any] = {}
    for response in inner.exec(decoupled=True):
        if response.has_error():
            message = response.error().message()
            errors = pb_utils.TritonError  # the core's comes with code INTERNAL whatever it was (Triton 2.51)
            code = errors.UNAVAILABLE if is_unavailable(message) else errors.INTERNAL
            return _refusal(message, code)
        found |= {tensor.name(): tensor for tensor in response.output_tensors() if tensor.name() in wanted}
    if len(found) < len(wanted):
        return _refusal("the core ended without a picture", pb_utils.TritonError.UNAVAILABLE)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, found[name].as_numpy()[0]) for name in wanted])


def _refusal(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
