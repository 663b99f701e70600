"""The liveness script as a container runs it, against a small server that answers as Triton does."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "liveness.py"
PNG_B64 = base64.b64encode(b"\x89PNG\r\n\x1a\n...").decode()
FULL = 503, {"error": "Model txt2img_core - Error when running inference: Exceeds maximum queue size"}


def answer(*data: object) -> dict[str, object]:
    return {"outputs": [{"name": "png_b64", "datatype": "BYTES", "shape": [len(data)], "data": list(data)}]}


class Triton(ThreadingHTTPServer):
    """infer: status and answer to a request. steps: what the core has counted at the next question."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.infer: Callable[[], tuple[int, object]] = lambda: (200, answer(PNG_B64))
        self.steps: Callable[[], int] = lambda: 3
        self.sizes: str | None = "768x512 128x64 512x512"
        self.asked: list[dict[str, Any]] = []  # the values of each request, by field

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Triton  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path == "/metrics":
            lines = [
                "# TYPE bksdm_stage_count counter",
                'nv_inference_request_success{model="txt2img",version="1"} ' + str(time.monotonic()),
                'bksdm_stage_count{stage="text"} 2.000000',
                f'bksdm_stage_count{{stage="step"}} {self.server.steps()}',
            ]
            self._answer(200, "\n".join(lines).encode())
        elif self.path == "/v2/models/txt2img/config":
            sizes = {} if self.server.sizes is None else {"sizes": {"string_value": self.server.sizes}}
            self._answer(200, {"name": "txt2img", "parameters": sizes})
        else:
            self._answer(404, {"error": "Not Found"})

    def do_POST(self) -> None:
        assert self.path == "/v2/models/txt2img/infer"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["outputs"] == [{"name": "png_b64"}]
        assert all(field["shape"] == [1] for field in request["inputs"])
        self.server.asked.append({field["name"]: field["data"][0] for field in request["inputs"]})
        self._answer(*self.server.infer())

    def _answer(self, status: int, content: object) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except BrokenPipeError:  # who asked did not wait
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def triton() -> Iterator[Triton]:
    with Triton() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(address: str, *flags: str, timeout: str = "60", answer_timeout: str = "60") -> tuple[int, str]:
    """Exit code and stderr; stdout stays empty. Long waits: a busy machine may stop the stand-in for seconds."""
    command = [
        sys.executable,
        "-I",
        str(SCRIPT),
        "--url",
        address,
        "--metrics-url",
        address,
        "--timeout",
        timeout,
        "--answer-timeout",
        answer_timeout,
        *flags,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


def test_a_server_that_draws_is_alive(triton: Triton) -> None:
    assert run(triton.address) == (0, "")


def test_it_asks_for_one_step_of_the_smallest_size_that_is_served(triton: Triton) -> None:
    run(triton.address)
    assert triton.asked == [
        {"prompt": "a red apple", "steps": 1, "format": "png_b64", "width": 128, "height": 64},
    ]


def test_a_server_that_names_no_sizes_chooses_its_own(triton: Triton) -> None:
    triton.sizes = None
    assert run(triton.address, "--steps", "2", "--prompt", "x") == (0, "")
    assert triton.asked == [{"prompt": "x", "steps": 2, "format": "png_b64"}]


def test_a_dead_model_is_told_in_one_sentence(triton: Triton) -> None:
    triton.infer = lambda: (500, {"error": "Stub process 'txt2img_0_0' is not healthy."})
    assert run(triton.address) == (
        1,
        "liveness: the server answered 500: Stub process 'txt2img_0_0' is not healthy.\n",
    )


@pytest.mark.parametrize("content", [{}, answer(), answer(""), answer("bm8gcGljdHVyZQ=="), answer("?"), answer(None)])
def test_an_answer_without_a_picture_is_no_life(triton: Triton, content: object) -> None:
    triton.infer = lambda: (200, content)
    assert run(triton.address) == (1, "liveness: txt2img answered 200 without a picture\n")


def test_an_answer_that_is_no_json_is_no_life(triton: Triton) -> None:
    triton.infer = lambda: (200, b"<html>")
    assert run(triton.address) == (1, "liveness: the server answered 200 without a JSON object\n")


def test_no_server_is_no_life() -> None:
    with Triton() as closed:
        address = closed.address
    code, message = run(address)
    assert code == 1
    assert message.startswith("liveness: /metrics at 127.0.0.1:")
    assert message.endswith("Connection refused\n")


def test_a_model_that_is_not_loaded_is_no_life(triton: Triton) -> None:
    assert run(triton.address, "--model", "other") == (1, "liveness: the server answered 404: Not Found\n")


def test_a_full_server_whose_core_works_is_alive(triton: Triton) -> None:
    triton.infer = lambda: FULL
    numbers = iter(range(3, 100))
    triton.steps = lambda: next(numbers)
    assert run(triton.address) == (0, "")


def test_a_full_server_whose_core_does_nothing_is_dead(triton: Triton) -> None:
    triton.infer = lambda: FULL
    assert run(triton.address, timeout="3") == (
        1,
        "liveness: the server is full, and the core did no step meanwhile\n",
    )


def slow() -> tuple[int, object]:
    time.sleep(1.5)
    return 200, answer(PNG_B64)


def test_a_server_that_hangs_is_dead(triton: Triton) -> None:
    triton.infer = slow
    assert run(triton.address, timeout="0.6") == (
        1,
        "liveness: no picture within 0.6 s, and the core did no step meanwhile\n",
    )


def test_a_slow_server_whose_core_works_is_alive(triton: Triton) -> None:
    triton.infer = slow
    numbers = iter(range(3, 100))
    triton.steps = lambda: next(numbers)
    assert run(triton.address, timeout="0.6") == (0, "")


def test_a_server_whose_counters_do_not_come_is_dead(triton: Triton) -> None:
    triton.steps = lambda: slow()[0]
    assert run(triton.address, answer_timeout="0.4") == (1, "liveness: /metrics did not answer within 0.4 s\n")


def test_an_address_that_is_none_is_misuse() -> None:
    code, message = run("localhost:8000")
    assert code == 2
    assert message.endswith("localhost:8000 is no address: http://host:port is one\n")
