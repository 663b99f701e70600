"""Throughput and latency of two servers that are asked by turns."""

from __future__ import annotations

import io
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tritonclient.grpc as grpc
from cpu_make import HERE, REPOSITORY
from PIL import Image

sys.path.insert(0, str(REPOSITORY))
from bksdm_export.triton_repository import RepositoryRequest, write_repository
from bksdm_runtime import bundle as bundles
from bksdm_runtime.client import Client
from bksdm_runtime.cores import physical_cores
from tests.triton.server import Server

OURS, PLAIN = "ours", "plain"
Draw = Callable[[str, int], bytes]


def compare(
    folder: Path, clients: Sequence[int], rounds: int, seconds: float, steps: int, threads: int | None
) -> dict[str, Any]:
    """Every turn's pictures per second and latencies, with what they were measured on."""
    with ExitStack() as stack:
        draws = {OURS: _ours(stack, folder, steps, threads), PLAIN: _plain(stack, folder, steps, threads)}
        first = {name: draw("the same picture", 7) for name, draw in draws.items()}
        if not np.array_equal(_pixels(first[OURS]), _pixels(first[PLAIN])):
            raise RuntimeError("the two servers draw different pictures")
        numbers = count()
        turns: list[dict[str, Any]] = []
        for number in clients:  # a warm-up at every concurrency
            for draw in draws.values():
                _turn(draw, number, seconds / 4, numbers)
        for turn in range(rounds):
            for number in clients:
                for name in (OURS, PLAIN) if turn % 2 == 0 else (PLAIN, OURS):
                    found = _turn(draws[name], number, seconds, numbers)
                    turns.append({"server": name, "clients": number, "round": turn, **found})
                    print(f"{name:>5} {number} clients: {found['per_second']:.2f} pictures/s", file=sys.stderr)
    return {
        "machine": f"{platform.machine()}, {physical_cores()} cores",
        "triton": "2.51, CPU",
        "onnxruntime": onnxruntime.__version__,
        "model": "demo, 128 px",
        "steps": steps,
        "threads": threads or physical_cores(),
        "seconds": seconds,
        "turns": turns,
    }


def _turn(draw: Draw, clients: int, seconds: float, numbers: count[int]) -> dict[str, Any]:
    """Clients that each ask again when they have a picture, for so long; what is under way at the end is counted."""
    latencies: list[float] = []

    def ask() -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            number = next(numbers)
            draw(f"picture {number}", number)
            latencies.append(time.perf_counter() - began)

    started = time.perf_counter()
    end = started + seconds
    with ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(ask) for _ in range(clients)]:
            one.result()
    elapsed = time.perf_counter() - started
    return {"per_second": len(latencies) / elapsed, "latencies": sorted(latencies)}


def _ours(stack: ExitStack, folder: Path, steps: int, threads: int | None) -> Draw:
    request = RepositoryRequest(
        bundle=bundles.demo(), output=folder / "models", backend="onnxruntime", threads=threads or 0, link=False
    )
    write_repository(request)
    (folder / "ours").mkdir()
    server = stack.enter_context(Server(request.output, folder / "ours"))
    client = stack.enter_context(Client(f"127.0.0.1:{server.grpc}"))
    return lambda prompt, seed: client.draw(prompt, seed=seed, steps=steps).png


def _plain(stack: ExitStack, folder: Path, steps: int, threads: int | None) -> Draw:
    model = folder / "plain-models" / "plain"
    shutil.copytree(bundles.demo(), model / "1" / "bundle")
    shutil.copy2(HERE / "plain" / "config.pbtxt", model)
    code = (HERE / "plain" / "model.py").read_text(encoding="utf-8")
    (model / "1" / "model.py").write_text(code.replace("THREADS = None", f"THREADS = {threads}"), encoding="utf-8")
    (folder / "plain").mkdir()
    server = stack.enter_context(Server(model.parent, folder / "plain"))
    client = stack.enter_context(grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}"))

    def draw(prompt: str, seed: int) -> bytes:
        values = {
            "prompt": ("BYTES", np.array([prompt.encode()], np.object_)),
            "seed": ("UINT64", np.array([seed], np.uint64)),
            "steps": ("INT32", np.array([steps], np.int32)),
        }
        inputs = []
        for name, (datatype, array) in values.items():
            one = grpc.InferInput(name, [1], datatype)
            one.set_data_from_numpy(array)
            inputs.append(one)
        return client.infer("plain", inputs).as_numpy("png").item()

    return draw


def _pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)))
