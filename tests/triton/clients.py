"""Small clients of both models, over each protocol that Triton speaks."""

from __future__ import annotations

import base64
import io
import json
import queue
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from numpy.typing import NDArray
from PIL import Image

from bksdm_runtime.request import Request
from bksdm_runtime.served_request import DTYPES, FIELDS
from tests.triton.server import Server

ALL = {
    "negative_prompt": "",
    "seed": 0,
    "steps": 4,
    "guidance_scale": 2.0,
    "height": 128,
    "width": 128,
    "sampler": "pndm",
    "format": "png_b64",
    "preview": False,
}


def fields_of(request: Request) -> dict[str, Any]:
    """The fields that ask for a request's picture, those that it leaves to the model at the demo's own values."""
    return ALL | {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance_scale": 2.0 if request.guidance_scale is None else request.guidance_scale,
        "height": request.height or 128,
        "width": request.width or 128,
        "sampler": request.sampler,
    }


def array_of(name: str, value: Any) -> NDArray[np.generic]:
    encoded = value.encode() if isinstance(value, str) else value
    return np.array([encoded], DTYPES[FIELDS[name].datatype])


def picture(text: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def front_fields(request: Request) -> dict[str, Any]:
    fields = fields_of(request)
    del fields["preview"]
    return fields


def generate(server: Server, request: Request) -> NDArray[np.uint8]:
    """Its picture over the front's `/generate`."""
    status, content = server.post("/v2/models/txt2img/generate", front_fields(request))
    assert status == 200, content
    assert content["seed_used"] == request.seed
    return picture(content["png_b64"])


def infer_http(server: Server, fields: dict[str, Any], outputs: list[str], model: str = "txt2img") -> Any:
    with http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
        inputs = []
        for name, value in fields.items():
            array = array_of(name, value)
            one = http.InferInput(name, list(array.shape), FIELDS[name].datatype)
            one.set_data_from_numpy(array)
            inputs.append(one)
        return client.infer(model, inputs, outputs=[http.InferRequestedOutput(name) for name in outputs])


def grpc_inputs(fields: dict[str, Any], *, batched: bool) -> list[Any]:
    inputs = []
    for name, value in fields.items():
        array = array_of(name, value)
        array = array[None] if batched else array
        one = grpc.InferInput(name, list(array.shape), FIELDS[name].datatype)
        one.set_data_from_numpy(array)
        inputs.append(one)
    return inputs


class Stream:
    """A stream of answers of the core; each is an array by name, or the error."""

    def __init__(self, client: Any, answers: queue.Queue[Any]) -> None:
        self.client = client
        self._answers = answers

    def ask(self, fields: dict[str, Any], **options: Any) -> None:
        self.client.async_stream_infer("txt2img_core", grpc_inputs(fields, batched=True), **options)

    def answer(self) -> dict[str, NDArray[Any]]:
        """The next one. Raises InferenceServerException where it is an error."""
        result, error = self._answers.get(timeout=60)
        if error is not None:
            raise error
        names = [output.name for output in result.get_response().outputs]
        return {name: result.as_numpy(name)[0] for name in names}

    def picture(self) -> tuple[list[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
        """Every step, and the last answer."""
        steps: list[dict[str, NDArray[Any]]] = []
        while "seed_used" not in (found := self.answer()):
            steps.append(found)
        return steps, found


@contextmanager
def stream(server: Server) -> Iterator[Stream]:
    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            yield Stream(client, answers)
        finally:
            client.stop_stream(cancel_requests=True)


@contextmanager
def events(server: Server, fields: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """The core's server-sent events, as they come; leaving the block hangs up."""
    body = json.dumps(fields).encode()
    asked = urllib.request.Request(server.url("/v2/models/txt2img_core/generate_stream"), body)
    with urllib.request.urlopen(asked, timeout=60) as response:
        yield (json.loads(line[len(b"data: ") :]) for line in response if line.startswith(b"data: "))
