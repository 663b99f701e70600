"""What `bksdm-client` does: pictures of one prompt from a server, several at once, each a whole file."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from bksdm_runtime.client import Client, ClientError, Picture, RefusedError, Step
from bksdm_runtime.image import ImageError, make_folder, refuse_unwritable, write_whole
from bksdm_runtime.naming import NamingError, targets
from bksdm_runtime.request import Request, RequestError

USER_ERRORS = (ClientError, ImageError, NamingError, RequestError)
MISUSE = (RefusedError, NamingError, RequestError)


@dataclass(frozen=True)
class Order:
    """Pictures of one prompt, number i by seed + i. fields: those of client.Fields, but for the seed.

    output: as naming.targets'. stream: tell of each step; previews: a folder for a small picture of each.
    """

    prompt: str
    fields: Mapping[str, Any]
    seed: int
    count: int
    output: str | None
    stream: bool
    previews: Path | None
    concurrency: int


def fetch(order: Order, client: Client) -> Generator[Path, None, None]:
    """Have every picture drawn, yielding each path, in order, when its file is whole.

    Progress goes to stderr. Closes the client: ending early cancels what is under way. Raises USER_ERRORS.
    """
    requests = [Request(order.prompt, seed=order.seed + i) for i in range(order.count)]
    places = targets(order.output, requests)
    folders = {place.path.parent for place in places}
    if order.previews is not None:
        folders.add(order.previews)
    for folder in folders:
        refuse_unwritable(folder)
    client.limits()  # says at once whether there is a server, before anything is made
    progress = _Progress(order)
    pool = ThreadPoolExecutor(order.concurrency)
    try:
        pending = [
            pool.submit(_draw, client, order, request.seed, place.path.stem, progress)
            for request, place in zip(requests, places, strict=True)
        ]
        for place, future in zip(places, pending, strict=True):
            picture = future.result()
            make_folder(place.path.parent)
            path = place.free_path()
            write_whole(path, picture.png)
            yield path
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()
        pool.shutdown()
        progress.close()


def _draw(client: Client, order: Order, seed: int, stem: str, progress: _Progress) -> Picture:
    if not (order.stream or order.previews):
        return client.draw(order.prompt, seed=seed, **order.fields)
    last: Step | Picture | None = None
    with closing(client.stream(order.prompt, preview=order.previews is not None, seed=seed, **order.fields)) as items:
        for last in items:
            if isinstance(last, Step):
                progress.step(last)
                if order.previews is not None and last.preview is not None:
                    make_folder(order.previews)
                    write_whole(order.previews / f"{stem}-{last.index + 1:03}.png", _png(last.preview))
    assert isinstance(last, Picture)  # the stream's last, or it raises
    return last


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


class _Progress:
    """One bar for all pictures of an order, in steps."""

    def __init__(self, order: Order) -> None:
        self._count = order.count
        self._wanted = order.stream or order.previews is not None
        self._bar: tqdm[NoReturn] | None = None
        self._lock = Lock()

    def step(self, step: Step) -> None:
        with self._lock:
            if self._bar is None:  # how many there are, the first step tells
                # disable=None: no bar where stderr is not a terminal, so that logs stay readable
                self._bar = tqdm(
                    total=step.total * self._count, desc="steps", disable=None, dynamic_ncols=True, file=sys.stderr
                )
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
