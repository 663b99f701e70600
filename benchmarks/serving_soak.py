"""Mixed load from several clients, and what it must not do to a server: fail a request, grow, or leak."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

from cpu_make import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
from bksdm_export.triton_repository import RepositoryRequest, write_repository
from bksdm_runtime import bundle as bundles
from bksdm_runtime.client import Client, ClientError, Picture, RefusedError
from bksdm_runtime.schedule import SAMPLERS
from tests.triton.server import Server

SIZES = ((128, 128), (64, 128))
MAX_STEPS = 100
WARM_UP = 1 / 3  # of the time: until every kind of work was done a few times, memory only rises
# Of what the processes hold after the warm-up.
GROWTH, SLACK = 0.05, 16 << 20


@dataclass
class Report:
    """What came of it. done, failed: requests by kind; memory: seconds, own bytes, shared bytes."""

    seconds: float
    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    left_behind: Sequence[str] = ()

    def windows(self, which: int) -> tuple[int, int]:
        """Medians of the memory after the warm-up and at the end: 1 for their own, 2 for what they share."""
        rest = [sample for sample in self.memory if sample[0] >= WARM_UP * self.seconds]
        third = max(1, len(rest) // 3)
        early, late = ([sample[which] for sample in part] for part in (rest[:third], rest[-third:]))
        return round(median(early)), round(median(late))

    def faults(self) -> list[str]:
        found = [*self.failed[:10]]
        if not all(self.done[kind] for kind in KINDS):
            found.append(f"not every kind of request was served: {dict(self.done)}")
        for which, name in ((1, "memory"), (2, "shared memory")):
            early, late = self.windows(which)
            if late > early * (1 + GROWTH) + SLACK:
                found.append(f"{name} grew from {early >> 20} to {late >> 20} MiB")
        if self.left_behind:
            found.append(f"shared memory is left behind: {', '.join(self.left_behind)}")
        return found

    def told(self) -> str:
        own, shared = self.windows(1), self.windows(2)
        lines = [
            f"{self.seconds:.0f} s: " + ", ".join(f"{number} {kind}" for kind, number in sorted(self.done.items())),
            f"memory of server and stubs, MiB: {own[0] >> 20} after the warm-up, {own[1] >> 20} at the end; "
            f"shared {shared[0] >> 20}, {shared[1] >> 20}; shared memory left behind: {len(self.left_behind)}",
            f"failed requests: {len(self.failed)}",
        ]
        return "\n".join([*lines, *self.faults()])


def soak(folder: Path, seconds: float, seed: int = 0) -> Report:
    """Write a repository of the demo, start a server of it, and load it for so long."""
    request = RepositoryRequest(
        bundle=bundles.demo(),
        output=folder / "models",
        sizes=SIZES,
        slots=4,
        fronts=4,
        max_steps=MAX_STEPS,
        steps=4,
        backend="onnxruntime",
        threads=1,
    )
    write_repository(request)
    report = Report(seconds)
    # Longer than the fronts take to end, a second each: what is left behind then is a leak.
    with (
        Server(request.output, folder, "--exit-timeout-secs=40") as server,
        Client(f"127.0.0.1:{server.grpc}", timeout=120) as client,
    ):
        load = _Load(server, client, report)
        started = time.monotonic()
        with ThreadPoolExecutor(len(KINDS)) as pool:
            working = [pool.submit(load.work, kind, started + seconds, seed) for kind in KINDS]
            while any(not one.done() for one in working):
                report.memory.append((time.monotonic() - started, *server.memory()))
                time.sleep(0.5)
            for one in working:
                one.result()
    report.left_behind = server.left_behind
    return report


class _Load:
    def __init__(self, server: Server, client: Client, report: Report) -> None:
        self.server, self.client, self._report = server, client, report
        self._lock = Lock()
        self._pictures: dict[str, str] = {}

    def work(self, kind: str, end: float, seed: int) -> None:
        """One client's life: one request after another of its kind."""
        chosen = random.Random(f"{kind} {seed}")
        while time.monotonic() < end:
            try:
                KINDS[kind](self, chosen)
            except (ClientError, OSError, ValueError, AssertionError) as error:
                with self._lock:
                    self._report.failed.append(f"{kind}: {type(error).__name__} {error}")
            else:
                with self._lock:
                    self._report.done[kind] += 1

    def same(self, fields: dict[str, Any], png: bytes) -> None:
        """A request's picture is what it was before, whatever was drawn beside it."""
        digest = hashlib.sha256(png).hexdigest()
        with self._lock:
            before = self._pictures.setdefault(json.dumps(fields, sort_keys=True), digest)
        assert digest == before, f"another picture of {fields}"


def _fields(chosen: random.Random) -> dict[str, Any]:
    height, width = chosen.choice(SIZES)
    return {
        "prompt": chosen.choice(["a red apple", "a blue car", "", "ein Haus am Meer " * 40]),
        "negative_prompt": chosen.choice(["", "blurred"]),
        "seed": chosen.randrange(4),
        "steps": chosen.choice([1, 3, 8, 20]),
        "guidance_scale": chosen.choice([1.0, 2.0]),
        "sampler": chosen.choice(SAMPLERS),
        "height": height,
        "width": width,
    }


def _draw(load: _Load, chosen: random.Random) -> None:
    fields = _fields(chosen)
    load.same(fields, load.client.draw(**fields).png)


def _stream(load: _Load, chosen: random.Random) -> None:
    fields = _fields(chosen)
    *steps, last = load.client.stream(preview=chosen.random() < 0.5, **fields)
    assert isinstance(last, Picture)
    assert len(steps) >= fields["steps"]
    load.same(fields, last.png)


def _cancel(load: _Load, chosen: random.Random) -> None:
    fields = _fields(chosen) | {"steps": MAX_STEPS}
    with closing(load.client.stream(**fields)) as items:
        for _ in range(chosen.randrange(1, 6)):
            next(items)


def _front(load: _Load, chosen: random.Random) -> None:
    status, _ = load.server.post("/v2/models/txt2img/generate", _fields(chosen) | {"format": "png_b64"}, timeout=120)
    assert status == 200, status


def _bad(load: _Load, chosen: random.Random) -> None:
    change = chosen.choice([{"steps": -1}, {"steps": 10**6}, {"height": 7}, {"sampler": "x"}, {"prompt": "x" * 9000}])
    try:
        load.client.draw(**(_fields(chosen) | change))
    except RefusedError:
        pass
    else:
        raise AssertionError(f"{change} was served")
    body: Any = chosen.choice([_fields(chosen) | change, {"prompt": 3}, b"{", {"steps": 3}])
    status, _ = load.server.post("/v2/models/txt2img/generate", body)
    assert 400 <= status <= 500, status
    time.sleep(0.2)


KINDS: dict[str, Callable[[_Load, random.Random], None]] = {
    "drawn": _draw,
    "drawn too": _draw,
    "streamed": _stream,
    "cancelled": _cancel,
    "drawn by the front": _front,
    "refused": _bad,
}
