"""Whether a server still draws: one tiny picture over HTTP, exit 0 or 1, one sentence on stderr.

    python3 liveness.py --timeout 60

Triton's own health says 200 while the process of a Python model is dead, and Triton never starts it again (2.51 and
2.64, server issue 8604): only an inference tells. The standard library alone, so that an image needs nothing else.

A server that is full is alive. Where the picture is turned away as UNAVAILABLE or does not come in time, the server
lives as long as it finished anything meanwhile: restarting it under load would only add to the load of the others.
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
# For what the server answers from memory; the picture has --timeout.
QUICK = 5.0
POLL = 0.5


class DeadError(Exception):
    """The server does not draw; the message says what it did instead."""


class LateError(Exception):
    """No answer in time."""


class Server:
    """A Triton server's HTTP side. address: as http://host:port."""

    def __init__(self, address: str, model: str) -> None:
        parts = urlsplit(address)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{address} is no address: http://host:port is one")
        self._host, self._port, self._model = parts.hostname, parts.port or 80, model

    def smallest(self) -> dict[str, int]:
        """Height and width of the smallest size that the model serves; empty where its configuration names none.

        Raises DeadError.
        """
        parameters = self._known(f"/v2/models/{self._model}/config").get("parameters", {})
        sizes = parameters.get("sizes", {}).get("string_value", "").split()
        if not sizes:
            return {}
        try:
            width, height = min((tuple(map(int, size.split("x"))) for size in sizes), key=lambda wh: wh[0] * wh[1])
        except ValueError:
            raise DeadError(f"{self._model} serves sizes {' '.join(sizes)[:80]!r}, not WIDTHxHEIGHT") from None
        return {"width": width, "height": height}

    def finished(self) -> int:
        """How many requests its models answered with success since they were loaded. Raises DeadError."""
        models = self._known("/v2/models/stats").get("model_stats", [])
        return sum(int(model["inference_stats"]["success"]["count"]) for model in models)

    def draw(self, request: dict[str, object], timeout: float) -> bool:
        """True: a picture came; False: the server is full. Raises LateError and DeadError."""
        status, answer = self._ask(f"/v2/models/{self._model}/generate", timeout, request)
        if status == 503:
            return False
        if status != 200:
            raise DeadError(f"{self._model} answered {status}: {str(answer.get('error', answer))[:300]}")
        try:
            picture = base64.b64decode(str(answer["png_b64"]), validate=True)
        except (KeyError, binascii.Error):
            picture = b""
        if not picture.startswith(PNG):  # a stub beside numpy 2 answers 200 with nothing in it (Triton 2.51)
            raise DeadError(f"{self._model} answered 200 without a picture in png_b64")
        return True

    def _known(self, path: str) -> dict[str, Any]:
        try:
            status, answer = self._ask(path, QUICK)
        except LateError:
            raise DeadError(f"{path} did not answer within {QUICK:g} s") from None
        if status != 200:
            raise DeadError(f"{path} answered {status}: {str(answer.get('error', answer))[:300]}")
        return answer

    def _ask(self, path: str, timeout: float, body: dict[str, object] | None = None) -> tuple[int, dict[str, Any]]:
        """GET, or POST where there is a body: status and JSON object of the answer. Raises LateError and DeadError."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, text = response.status, response.read()
        except TimeoutError:
            raise LateError from None
        except (OSError, http.client.HTTPException) as error:
            raise DeadError(f"{path} at {self._host}:{self._port}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        try:
            answer = json.loads(text or b"{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise DeadError(f"{path} answered {status} without a JSON object")
        return status, answer


def check(server: Server, prompt: str, steps: int, timeout: float) -> None:
    """Return if the server draws, or is full and at work. timeout: seconds for the picture. Raises DeadError."""
    end = time.monotonic() + timeout
    before = server.finished()
    request = {"prompt": prompt, "steps": steps, "format": "png_b64", **server.smallest()}
    try:
        if server.draw(request, timeout):
            return
        reason = "the server is full"
    except LateError:
        reason = f"no picture within {timeout:g} s"
    while server.finished() == before:
        if time.monotonic() >= end:
            raise DeadError(f"{reason}, and nothing else was finished meanwhile")
        time.sleep(POLL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exit 0 if the server draws a tiny picture, 1 with the reason if not.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server's HTTP port (%(default)s)")
    parser.add_argument("--model", default="txt2img", help="%(default)s")
    parser.add_argument("--prompt", default="a red apple", help="%(default)s")
    parser.add_argument("--steps", type=int, default=1, help="%(default)s")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that the picture may take (%(default)s)")
    options = parser.parse_args()
    try:
        server = Server(options.url, options.model)
    except ValueError as error:
        parser.error(str(error))
    try:
        check(server, options.prompt, options.steps, options.timeout)
    except DeadError as error:
        sys.exit(f"liveness: {error}")


if __name__ == "__main__":
    main()
