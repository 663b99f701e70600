"""The core: draws pictures for many clients at once, and answers each step by step.

Thin: tensors of Triton's to the runtime package's service and back. `execute` blocks while every slot is taken, so that
Triton's own queue holds what waits, with its limits and its metrics.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from bksdm_runtime.request import RequestError
from bksdm_runtime.served_request import FIELDS, Order, read
from bksdm_runtime.service import SERVICE_ERRORS, Refusal, open_service

# By name: while this file is imported, the module has nothing yet of what Triton puts into it.
_CODES = {"invalid": "INVALID_ARG", "internal": "INTERNAL", "unavailable": "UNAVAILABLE", "cancelled": "CANCELLED"}
_STEP_OUTPUTS = {"step", "of_steps", "preview_image"}
_TOLD_EVERY = 0.25  # seconds
_STAGES = ("queue", "text", "step", "decode", "encode")


class Metrics:
    """Counters beside Triton's own; a stage's mean duration is its seconds over its count."""

    def __init__(self) -> None:
        self._lock, self._telling = Lock(), Lock()
        self._families: list[Any] = []  # kept: one that is collected takes its metrics along
        self._counters: dict[tuple[str, str], Any] = {}
        self._waiting: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._told = 0.0

    def start(self) -> None:
        """Make the counters; until then what is observed waits.

        Only where nothing of a load can fail any more: then Triton 2.51 dies of a segmentation fault.
        """
        kind = pb_utils.MetricFamily.COUNTER
        families = [
            pb_utils.MetricFamily(name=name, description=description, kind=kind)
            for name, description in (
                ("bksdm_stage_seconds", "Seconds spent in a stage of drawing, of all calls"),
                ("bksdm_stage_count", "Calls of a stage of drawing; a step's call serves several pictures"),
                ("bksdm_steps", "Steps of pictures: over the count of stage step, how many pictures shared one"),
            )
        ]
        seconds, count, steps = families
        counters: dict[tuple[str, str], Any] = {("", "steps"): steps.Metric(labels={})}
        for stage in _STAGES:
            counters[stage, "seconds"] = seconds.Metric(labels={"stage": stage})
            counters[stage, "count"] = count.Metric(labels={"stage": stage})
        self._families, self._counters = families, counters

    def observe(self, stage: str, seconds: float, pictures: int) -> None:
        with self._lock:  # two threads observe
            self._waiting[stage, "seconds"] += seconds
            self._waiting[stage, "count"] += 1
            if stage == "step":
                self._waiting["", "steps"] += pictures
            # A counter is a call to another process, 0.4 ms. "encode" comes from a thread that keeps no step waiting;
            # the one that draws makes them only where pictures take long.
            now = time.monotonic()
            if not self._counters or (stage != "encode" and now - self._told < _TOLD_EVERY):
                return
            self._told = now
            waiting, self._waiting = self._waiting, defaultdict(float)
        try:
            with self._telling:
                for key, value in waiting.items():
                    self._counters[key].increment(value)
        except pb_utils.TritonModelException as error:  # no picture is lost for it
            logging.warning("a metric is not counted: %s", error)


class Sender:
    """One client's answers, as Triton's responses; see `service.Answers`."""

    def __init__(self, sender: Any, wanted: Collection[str]) -> None:
        self._sender = sender
        self._sends_steps = not _STEP_OUTPUTS.isdisjoint(wanted)

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()

    def step(self, index: int, total: int, preview: Any) -> None:
        if not self._sends_steps:  # the front asks for a picture alone
            return
        tensors = {"step": _one(index + 1, np.int32), "of_steps": _one(total, np.int32)}
        if preview is not None:
            tensors["preview_image"] = preview[None]  # [1, h, w, 3]
        self._sender.send(_response(tensors))

    def picture(self, output: str, value: Any, seed: int) -> None:
        picture = value[None] if output == "image" else _one(value, np.object_)  # [1, H, W, 3]
        tensors = {output: picture, "seed_used": _one(seed, np.uint64)}
        self._sender.send(_response(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def refuse(self, refusal: Refusal) -> None:
        error = pb_utils.TritonError(refusal.message, getattr(pb_utils.TritonError, _CODES[refusal.kind]))
        response = pb_utils.InferenceResponse(error=error)
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class TritonPythonModel:
    """What the Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="txt2img_core: %(levelname)s %(message)s")
        parameters = json.loads(args["model_config"])["parameters"]
        texts = {name: value["string_value"] for name, value in parameters.items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        metrics = Metrics()
        try:
            self._service, self._limits = open_service(folder, texts, metrics.observe)
            self._queue_seconds = float(texts["queue_seconds"])
        except SERVICE_ERRORS as error:
            raise pb_utils.TritonModelException(str(error)) from None
        metrics.start()

    def execute(self, requests: list[Any]) -> None:
        asked: list[tuple[Order, Sender, float]] = []
        for request in requests:
            sender = Sender(request.get_response_sender(), request.requested_output_names())
            try:
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                order = read({name: array for name, array in tensors.items() if name in FIELDS}, self._limits)
            except RequestError as error:
                sender.refuse(Refusal("invalid", str(error)))
            except Exception:  # what is not caught goes to the client with paths of this machine
                logging.exception("a request cannot be read")
                sender.refuse(Refusal("internal", "the request cannot be read: the server's log says why"))
            else:
                seconds = request.timeout() / 1e6 or self._queue_seconds  # microseconds, 0 where it does not say
                asked.append((order, sender, seconds))
        self._service.submit_all(asked)

    def finalize(self) -> None:
        self._service.close()


def _one(value: Any, dtype: Any) -> Any:
    return np.array([[value]], dtype)


def _response(tensors: dict[str, Any]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])
