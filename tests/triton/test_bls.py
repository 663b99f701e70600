"""The plain layout's loop on a real server, which has no ONNX Runtime backend: Python models stand in for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bksdm_export.triton_bls import COMPONENTS
from bksdm_export.triton_repository import RepositoryRequest, write_repository
from bksdm_runtime import bundle as bundles
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request
from tests.triton.clients import front_fields, generate, infer_http
from tests.triton.server import Server

STANDS_IN = """
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = f"{args['model_repository']}/1/model.onnx"
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        names = list(request.requested_output_names())
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        found = self._session.run(names, inputs)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in zip(names, found)])
"""


@pytest.fixture
def bls(tmp_path: Path) -> Path:
    request = RepositoryRequest(
        bundles.demo(), tmp_path / "models", sizes=((128, 128), (64, 128)), steps=4, slots=2, layout="bls"
    )
    write_repository(request)
    for name in COMPONENTS:
        folder = request.output / name
        for config in (folder / "config.pbtxt", folder / "configs" / "cpu.pbtxt"):
            config.write_text(config.read_text().replace('"onnxruntime"', '"python"'))
        (folder / "1" / "model.py").write_text(STANDS_IN)
    return request.output


def test_the_loop_draws_what_the_request_makes_alone_and_refuses_as_the_front_does(
    bls: Path, tmp_path: Path, alone: Pipeline
) -> None:
    requests = [
        Request("a red apple", seed=7, steps=4),
        Request("a blue car", seed=3, steps=3, sampler="euler", guidance_scale=1.0, height=64, width=128),
    ]
    (tmp_path / "server").mkdir()
    with Server(bls, tmp_path / "server") as server:
        for request in requests:
            np.testing.assert_array_equal(generate(server, request), alone.draw([request])[0])
        raw = infer_http(server, front_fields(requests[0]) | {"format": "raw"}, ["image", "seed_used"])
        np.testing.assert_array_equal(raw.as_numpy("image"), alone.draw([requests[0]])[0])
        status, content = server.post("/v2/models/txt2img/generate", {"prompt": "a", "steps": -3})
        assert status == 400
        assert "steps must be a whole number from 1 to 100, found -3" in content["error"]
