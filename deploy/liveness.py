"""Whether a server still draws: one tiny picture over HTTP, exit 0 or 1, one sentence on stderr.

    python3 liveness.py --timeout 60

Triton's own health says 200 while the process of a Python model is dead, and Triton never starts it again (2.51 and
2.64, server issue 8604): only an inference tells. The standard library alone, so that an image needs nothing else.

A server that is full is alive. Where the picture is turned away (503) or does not come in time, the server lives if its
core worked meanwhile: the core counts every step. Restarting a server under load would only add to that of the others.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import http.client
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

PNG = b"\x89PNG\r\n\x1a\n"
POLL = 0.5
# The core's own counter, beside Triton's: those of Triton count requests that were turned away as done, too (2.51).
WORK = "bksdm_stage_count"


class DeadError(Exception):
    """The server does not draw; the message says what it did instead."""


class LateError(Exception):
    """No answer in time."""


class Server:
    """A Triton server's HTTP side.

    address, metrics: as http://host:port; answer_timeout: seconds for each answer that it has in memory.
    """

    def __init__(self, address: str, metrics: str, model: str, answer_timeout: float) -> None:
        self._address, self._metrics, self._model = _host_and_port(address), _host_and_port(metrics), model
        self._answer_timeout = answer_timeout

    def smallest(self) -> tuple[int, int] | None:
        """Width and height of the smallest size that the model serves; None where its configuration names none.

        Raises DeadError.
        """
        status, text = self._known(self._address, f"/v2/models/{self._model}/config")
        sizes = _read(status, text).get("parameters", {}).get("sizes", {}).get("string_value", "").split()
        try:
            pairs = [(int(width), int(height)) for width, height in (size.split("x") for size in sizes)]
        except ValueError:
            raise DeadError(f"{self._model} serves sizes {' '.join(sizes)[:80]!r}, not WIDTHxHEIGHT") from None
        return min(pairs, key=lambda pair: pair[0] * pair[1], default=None)

    def work(self) -> float:
        """What the core has done since it was loaded: calls of a stage, of which a step is one. Raises DeadError."""
        _, text = self._known(self._metrics, "/metrics")
        lines = text.decode(errors="replace").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(WORK + "{"))

    def draw(self, prompt: str, steps: int, size: tuple[int, int] | None, timeout: float) -> bool:
        """True: a picture came; False: the server is full. Raises LateError and DeadError."""
        # Not /generate, which answers 400 whatever is wrong (Triton 2.51): full and dead look alike there.
        inputs = [_input("prompt", "BYTES", prompt), _input("steps", "INT32", steps)]
        if size is not None:
            inputs += [_input("width", "INT32", size[0]), _input("height", "INT32", size[1])]
        inputs.append(_input("format", "BYTES", "png_b64"))
        request = {"inputs": inputs, "outputs": [{"name": "png_b64"}]}
        status, text = _ask(self._address, f"/v2/models/{self._model}/infer", timeout, request)
        if status == 503:
            return False
        answer = _read(status, text)
        try:
            picture = base64.b64decode(answer["outputs"][0]["data"][0], validate=True)
        except (LookupError, TypeError, binascii.Error):
            picture = b""
        if not picture.startswith(PNG):  # a stub beside numpy 2 answers 200 with nothing in it (Triton 2.51)
            raise DeadError(f"{self._model} answered 200 without a picture")
        return True

    def _known(self, address: tuple[str, int], path: str) -> tuple[int, bytes]:
        try:
            status, text = _ask(address, path, self._answer_timeout)
        except LateError:
            raise DeadError(f"{path} did not answer within {self._answer_timeout:g} s") from None
        if status != 200:
            _read(status, text)
        return status, text


def _host_and_port(address: str) -> tuple[str, int]:
    """Raises ValueError."""
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{address} is no address: http://host:port is one")
    return parts.hostname, parts.port or 80


def _input(name: str, datatype: str, value: object) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": [1], "data": [value]}


def _ask(
    address: tuple[str, int], path: str, timeout: float, body: dict[str, object] | None = None
) -> tuple[int, bytes]:
    """GET, or POST where there is a body: status and content. Raises LateError and DeadError."""
    host, port = address
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        raise LateError from None
    except (OSError, http.client.HTTPException) as error:
        raise DeadError(f"{path} at {host}:{port}: {str(error) or type(error).__name__}") from None
    finally:
        connection.close()


def _read(status: int, text: bytes) -> dict[str, Any]:
    """The JSON object of an answer of 200. Raises DeadError: another status with what the server says, or no object."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if status != 200:
        said = answer.get("error", "") if isinstance(answer, dict) else ""
        raise DeadError(f"the server answered {status}: {str(said)[:300] or 'no reason given'}")
    if not isinstance(answer, dict):
        raise DeadError("the server answered 200 without a JSON object")
    return answer


def check(server: Server, prompt: str, steps: int, timeout: float) -> None:
    """Return if the server draws, or is full and at work. timeout: seconds for the picture. Raises DeadError."""
    end = time.monotonic() + timeout
    before = server.work()
    try:
        if server.draw(prompt, steps, server.smallest(), timeout):
            return
        reason = "the server is full"
    except LateError:
        reason = f"no picture within {timeout:g} s"
    while server.work() == before:
        if time.monotonic() >= end:
            raise DeadError(f"{reason}, and the core did no step meanwhile")
        time.sleep(POLL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exit 0 if the server draws a tiny picture, 1 with the reason if not.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server's HTTP port (%(default)s)")
    parser.add_argument("--metrics-url", default="http://127.0.0.1:8002", help="of its metrics' port (%(default)s)")
    parser.add_argument("--model", default="txt2img", help="%(default)s")
    parser.add_argument("--prompt", default="a red apple", help="%(default)s")
    parser.add_argument("--steps", type=int, default=1, help="%(default)s")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that the picture may take (%(default)s)")
    parser.add_argument(
        "--answer-timeout", type=float, default=5.0, help="seconds for what it answers from memory, each (%(default)s)"
    )
    options = parser.parse_args()
    try:
        server = Server(options.url, options.metrics_url, options.model, options.answer_timeout)
    except ValueError as error:
        parser.error(str(error))
    try:
        check(server, options.prompt, options.steps, options.timeout)
    except DeadError as error:
        sys.exit(f"liveness: {error}")


if __name__ == "__main__":
    main()
