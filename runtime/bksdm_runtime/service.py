"""A pipeline that many clients share: one thread drives it, each client's answers go where that client said.

It knows no server: whoever has clients hands their orders to `Service.submit`, which blocks while every slot is taken,
so that the queue before it, with its limits, is the only one.
"""

from __future__ import annotations

import base64
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition, Thread
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.image import encode_png
from bksdm_runtime.inflight import Drawn, InFlight, Observe, Stepped
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.preview import Preview
from bksdm_runtime.request import RequestError
from bksdm_runtime.schedule import ScheduleError
from bksdm_runtime.served_request import Limits, LimitsError, Order
from bksdm_runtime.strict_json import JsonError
from bksdm_runtime.tokenizer import TokenizerError

BUNDLE_FOLDER, PREVIEW_FILE = "bundle", "preview.json"
# What a server's operator can cause: each message is one sentence, and no traceback belongs to it.
SERVICE_ERRORS = (BundleError, EngineError, LimitsError, TokenizerError)

_LOOKS_EVERY = 0.2  # seconds, at those that wait: asking whether one is cancelled is a call to the server's process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """Why there is no picture. kind: "invalid" (the client's doing), "internal", "unavailable" or "cancelled".

    message: one sentence for the client, which names nothing of this machine.
    """

    kind: str
    message: str


_LOST = Refusal("internal", "the picture is lost: the server's log says why")
_ENDED = Refusal("unavailable", "this server draws no pictures any more: load the model again")
_OVERDUE = Refusal("unavailable", "timeout expired: the request waited too long for a slot")
_CANCELLED = Refusal("cancelled", "the request was cancelled")


class Answers(Protocol):
    """Where one client's answers go. Called from other threads than `submit`, never from two at once."""

    def is_cancelled(self) -> bool: ...

    def step(self, index: int, total: int, preview: NDArray[np.uint8] | None) -> None:
        """An evaluation is done: which, from 0, of how many. preview: [h, w, 3], where the order asks for it."""
        ...

    def picture(self, output: str, value: bytes | NDArray[np.uint8], seed: int) -> None:
        """The last answer. output: "png", "png_b64" (bytes both), or "image" ([H, W, 3])."""
        ...

    def refuse(self, refusal: Refusal) -> None:
        """The last answer, instead."""
        ...


@dataclass(frozen=True)
class _Client:
    order: Order
    answers: Answers
    came: float
    until: float  # when it has waited long enough for a slot


class Service:
    """Takes orders for as long as it lives. preview: makes the small pictures; None gives none.

    observe: as InFlight's, and told of "queue", what an order waited in here for a slot, and of "encode".
    """

    def __init__(
        self, under_way: InFlight, preview: Preview | None = None, observe: Observe = lambda stage, seconds, count: None
    ) -> None:
        self._under_way = under_way
        self._preview = preview
        self._observe = observe
        self._changed = Condition()
        self._arrived: list[_Client] = []
        self._clients: dict[int, _Client] = {}  # by ticket
        self._taken = 0
        self._ended = False
        self._encoding = ThreadPoolExecutor(1)  # zlib lets go of the GIL: the next step does not wait for a PNG
        self._worker = Thread(target=self._work, name="bksdm-service")
        self._worker.start()

    def submit(self, order: Order, answers: Answers) -> None:
        """Have a picture drawn. Blocks while every slot is taken; its answers may come before it returns."""
        self.submit_all([(order, answers, math.inf)])

    def submit_all(self, asked: Sequence[tuple[Order, Answers, float]]) -> None:
        """Have pictures drawn, each with the seconds that it may wait in here for a slot, in their order.

        Blocks until the last has one. What is cancelled or overdue meanwhile is refused then, and holds nothing up.
        """
        came = time.perf_counter()
        waiting: list[_Client] = [_Client(order, answers, came, came + wait) for order, answers, wait in asked]
        while waiting and self._is_alive():
            with self._changed:
                if self._taken >= self._under_way.slots:
                    # Waking from time to time shows a worker that died where nothing could tell of it, too.
                    self._changed.wait(_LOOKS_EVERY)
                if self._taken < self._under_way.slots and self._is_alive():
                    self._taken += 1
                    self._arrived.append(waiting.pop(0))
                    self._changed.notify_all()
                    continue
            waiting = [client for client in waiting if not self._gave_up(client)]
        for client in waiting:
            _told(client, lambda c=client: c.answers.refuse(_ENDED))

    def _gave_up(self, client: _Client) -> bool:
        if _is_cancelled(client):
            refusal = _CANCELLED
        elif time.perf_counter() > client.until:
            refusal = _OVERDUE
        else:
            return False
        self._observe("queue", time.perf_counter() - client.came, 1)
        _told(client, lambda: client.answers.refuse(refusal))
        return True

    def close(self) -> None:
        """End: pictures under way are refused, threads are joined."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._worker.join()
        self._encoding.shutdown()

    def _is_alive(self) -> bool:
        return self._worker.is_alive() and not self._ended

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._arrived or self._clients or self._ended):
                        self._changed.wait()
                    if self._ended:
                        return
                    arrived, self._arrived = self._arrived, []
                for client in arrived:
                    self._admit(client)
                for ticket, client in list(self._clients.items()):
                    if _is_cancelled(client):
                        self._let_go(ticket, _CANCELLED)
                self._advance()
        except BaseException:
            log.exception("the service ends")
            raise
        finally:
            self._end()

    def _admit(self, client: _Client) -> None:
        self._observe("queue", time.perf_counter() - client.came, 1)
        if _is_cancelled(client):
            self._free(client, _CANCELLED)
            return
        try:
            ticket = self._under_way.admit(client.order.request)
        except (RequestError, ScheduleError) as error:
            self._free(client, Refusal("invalid", str(error)))
        except Exception as error:  # whatever it is, it is this picture's alone
            _say(error)
            self._free(client, _LOST)
        else:
            self._clients[ticket] = client

    def _advance(self) -> None:
        try:
            events = self._under_way.advance()
        except Exception as error:  # none of ours: nobody knows whose picture it was
            _say(error)
            for ticket in list(self._clients):
                self._let_go(ticket, _LOST)
            return
        for event in events:
            client = self._clients[event.ticket]
            if isinstance(event, Stepped):
                preview = self._preview if client.order.preview else None
                small = None if preview is None else preview(event.latents)
                if not _told(client, lambda c=client, e=event, s=small: c.answers.step(e.index, e.total, s)):
                    self._let_go(event.ticket, _CANCELLED)
            elif isinstance(event, Drawn):
                del self._clients[event.ticket]
                self._free(client)
                self._encoding.submit(self._encode, client, event)
            else:
                _say(event.error)
                self._let_go(event.ticket, _LOST)

    def _encode(self, client: _Client, drawn: Drawn) -> None:
        started = time.perf_counter()
        try:
            output, value = encoded(
                self._under_way.pipeline, replace(client.order, request=drawn.request), drawn.pixels
            )
        except Exception as error:
            _say(error)
            _told(client, lambda: client.answers.refuse(_LOST))
            return
        self._observe("encode", time.perf_counter() - started, 1)
        _told(client, lambda: client.answers.picture(output, value, drawn.request.seed))

    def _let_go(self, ticket: int, refusal: Refusal) -> None:
        self._under_way.cancel(ticket)
        self._free(self._clients.pop(ticket), refusal)

    def _free(self, client: _Client, refusal: Refusal | None = None) -> None:
        """Give a client's slot to the next one, and its last answer to the client."""
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()
        if refusal is not None:
            _told(client, lambda: client.answers.refuse(refusal))

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            left = [*self._arrived, *self._clients.values()]
            self._arrived, self._clients = [], {}
            self._changed.notify_all()
        for client in left:
            _told(client, lambda c=client: c.answers.refuse(_ENDED))


def encoded(pipeline: Pipeline, order: Order, pixels: NDArray[np.uint8]) -> tuple[str, bytes | NDArray[np.uint8]]:
    """A picture in its order's format: the output's name, see Answers.picture, and its value."""
    if order.format == "raw":
        return "image", pixels
    png = encode_png(pixels, order.request, pipeline.provenance())
    return order.format, base64.b64encode(png) if order.format == "png_b64" else png


def open_service(folder: Path, parameters: Mapping[str, str], observe: Observe) -> tuple[Service, Limits]:
    """The service of a folder that holds a bundle and its preview. Every file of the bundle is verified, the backend
    is chosen, and every served size is tried in every company: nothing is downloaded or built.

    parameters: those of Limits, `slots` and `backend`, `threads` (0: one per core). Raises SERVICE_ERRORS.
    """
    limits = Limits.from_parameters(parameters)
    slots, threads = (_count(parameters, name) for name in ("slots", "threads"))
    settings = EngineSettings(
        backend=parameters.get("backend", "auto"),
        threads=threads or None,
        kept_shapes=len(limits.sizes) * max(1, slots).bit_length(),
    )
    bundle = bundles.load(folder / BUNDLE_FOLDER)
    try:
        preview = Preview.from_json((folder / PREVIEW_FILE).read_text("utf-8"))
    except OSError as error:
        raise BundleError(f"{PREVIEW_FILE} cannot be read: {error.strerror}") from None
    except (JsonError, ValueError) as error:
        raise BundleError(f"{PREVIEW_FILE}: {error}") from None
    if len(preview.matrix) != bundle.manifest.model.latent_channels + 1:
        raise BundleError(f"{PREVIEW_FILE} is of another model: write the repository again")
    pipeline = Pipeline.open(bundle, settings)
    if slots < 1:
        raise LimitsError(f"parameter slots must be at least 1, found {slots}")
    under_way = InFlight(pipeline, slots=slots, observe=observe)
    for height, width in limits.sizes:
        counts = under_way.counts(height, width)
        log.info("%dx%d px: evaluations are shared by %s rows, two a guided picture", width, height, counts or "no")
    return Service(under_way, preview, observe), limits


def _count(parameters: Mapping[str, str], name: str) -> int:
    text = parameters.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise LimitsError(f"parameter {name} must be a whole number, found {text[:40]!r}")
    return int(text)


def _is_cancelled(client: _Client) -> bool:
    try:
        return client.answers.is_cancelled()
    except Exception as error:  # a server that is going down
        _say(error)
        return True


def _told(client: _Client, tell: Callable[[], None]) -> bool:
    """Whether an answer went out: a client that is gone must not harm the others."""
    try:
        tell()
    except Exception as error:
        log.warning("a client of seed %d cannot be answered: %s", client.order.request.seed, error)
        return False
    return True


def _say(error: Exception) -> None:
    log.error("a picture is lost: %s", error, exc_info=None if isinstance(error, EngineError) else error)
