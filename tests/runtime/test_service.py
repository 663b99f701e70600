"""The service that clients share, without a server: answers, blocking, cancelling, refusals, and its death."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bksdm_runtime.bundle import BundleError
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.inflight import InFlight
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.preview import Preview
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import StepsError
from bksdm_runtime.served_request import Limits, LimitsError, Order, is_unavailable
from bksdm_runtime.service import Refusal, Service, open_service

GREY = Preview(np.full((5, 3), 0.5, np.float32), 0.0, 1)
LONG = 900


@pytest.fixture(scope="module")
def pipeline(toy_bundle: Path) -> Pipeline:
    return Pipeline.open(toy_bundle, EngineSettings(backend="onnxruntime", threads=1))


class Noted:
    """Answers that are kept."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.previews: list[NDArray[np.uint8] | None] = []
        self.last: Any = None
        self.cancelled = False
        self.stepped, self.done = threading.Event(), threading.Event()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def step(self, index: int, total: int, preview: NDArray[np.uint8] | None) -> None:
        self.steps.append((index, total))
        self.previews.append(preview)
        self.stepped.set()

    def picture(self, output: str, value: bytes | NDArray[np.uint8], seed: int) -> None:
        assert self.last is None
        self.last = (output, value, seed)
        self.done.set()

    def refuse(self, refusal: Refusal) -> None:
        assert self.last is None
        self.last = refusal
        self.done.set()

    def wait(self) -> Any:
        assert self.done.wait(20)
        return self.last


class Held(Noted):
    """Answers that hold the service up at a picture's first step."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def step(self, index: int, total: int, preview: NDArray[np.uint8] | None) -> None:
        super().step(index, total, preview)
        assert self.go_on.wait(20)


def order(steps: int = 2, seed: int = 0, picture_format: str = "raw", *, preview: bool = False) -> Order:
    request = Request("a red apple", steps=steps, seed=seed, sampler="ddim")
    return Order(request, picture_format, preview)


def asked(service: Service, *args: Any, **kwargs: Any) -> Noted:
    answers = Noted()
    service.submit(order(*args, **kwargs), answers)
    return answers


@pytest.fixture
def service(pipeline: Pipeline) -> Iterator[Service]:
    opened = Service(InFlight(pipeline, slots=2), GREY)
    yield opened
    opened.close()


def test_steps_come_and_then_the_picture(service: Service, pipeline: Pipeline) -> None:
    answers = asked(service, 3, seed=4)
    output, pixels, seed = answers.wait()
    assert answers.steps == [(0, 3), (1, 3), (2, 3)]
    assert answers.previews == [None] * 3
    assert (output, seed) == ("image", 4)
    np.testing.assert_array_equal(pixels, pipeline.draw([order(3, 4).request])[0])


def test_a_preview_comes_with_every_step_where_it_is_asked_for(service: Service) -> None:
    answers = asked(service, preview=True)
    answers.wait()
    assert [small.shape for small in answers.previews if small is not None] == [(8, 8, 3)] * 2


@pytest.mark.parametrize("picture_format", ["png", "png_b64"])
def test_a_png_says_how_it_was_made(service: Service, pipeline: Pipeline, picture_format: str) -> None:
    output, value, _ = asked(service, seed=9, picture_format=picture_format).wait()
    assert output == picture_format
    picture = Image.open(io.BytesIO(base64.b64decode(value) if output == "png_b64" else value))
    assert picture.info["seed"] == "9"
    assert picture.info["bundle"] == pipeline.bundle.sha256
    np.testing.assert_array_equal(np.asarray(picture), pipeline.draw([order(seed=9).request])[0])


def test_submitting_blocks_while_every_slot_is_taken(service: Service) -> None:
    first, third = Held(), Noted()
    service.submit(order(LONG), first)
    asked(service, LONG, seed=1)
    submitting = threading.Thread(target=service.submit, args=(order(), third))
    submitting.start()
    submitting.join(0.3)
    assert submitting.is_alive()
    first.cancelled = True
    first.go_on.set()
    submitting.join(20)
    assert not submitting.is_alive()
    assert third.wait()[0] == "image"


def test_what_waits_for_a_slot_is_refused_when_it_is_cancelled_or_overdue_and_the_rest_waits_on(
    service: Service,
) -> None:
    held, other = Held(), Noted()  # the service stands still while they wait: no slot gets free
    service.submit(order(LONG), held)
    service.submit(order(LONG), other)
    overdue, cancelled, patient = Noted(), Noted(), Noted()
    waiting = [(order(), overdue, 0.3), (order(), cancelled, 60.0), (order(), patient, 60.0)]
    submitting = threading.Thread(target=service.submit_all, args=(waiting,))
    submitting.start()
    cancelled.cancelled = True
    assert cancelled.wait().kind == "cancelled"
    refusal = overdue.wait()
    assert refusal.kind == "unavailable"
    assert is_unavailable(refusal.message)
    assert patient.last is None
    held.cancelled = True
    held.go_on.set()
    assert patient.wait()[0] == "image"
    other.cancelled = True
    submitting.join(20)


def test_a_cancelled_picture_stops_within_a_step(service: Service) -> None:
    answers = Held()
    service.submit(order(LONG), answers)
    assert answers.stepped.wait(20)
    answers.cancelled = True
    answers.go_on.set()
    assert answers.wait() == Refusal("cancelled", "the request was cancelled")
    assert answers.steps == [(0, LONG)]


def test_a_client_that_cannot_be_answered_harms_no_other(service: Service) -> None:
    class Gone(Noted):
        def step(self, index: int, total: int, preview: NDArray[np.uint8] | None) -> None:
            raise RuntimeError("the connection is closed")

    gone = Gone()
    service.submit(order(LONG), gone)
    assert asked(service, 3).wait()[0] == "image"
    assert gone.wait().kind == "cancelled"


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (StepsError("13 steps: choose 1 to 12"), "invalid", "13 steps: choose 1 to 12"),
        (EngineError("/models/secret.onnx is broken"), "internal", "the picture is lost: the server's log says why"),
        (KeyError("odd"), "internal", "the picture is lost: the server's log says why"),
    ],
)
def test_what_the_pipeline_raises_is_one_sentence_without_a_path(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, says: str
) -> None:
    def raise_it(*_: object) -> None:
        raise error

    for method in ("admit", "advance"):
        if method == "advance" and kind == "invalid":
            continue
        with monkeypatch.context() as patch:
            patch.setattr(InFlight, method, raise_it)
            assert asked(service).wait() == Refusal(kind, says)
    assert asked(service).wait()[0] == "image"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_worker_dies_every_client_is_told_and_the_next_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Held()
    service.submit(order(LONG), running)
    assert running.stepped.wait(20)

    def die(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(InFlight, "advance", die)
    running.go_on.set()
    assert running.wait().kind == "unavailable"
    service._worker.join(20)
    assert asked(service).wait().kind == "unavailable"


def test_closing_refuses_what_is_under_way(pipeline: Pipeline) -> None:
    service = Service(InFlight(pipeline, slots=1))
    running = Held()
    service.submit(order(LONG), running)
    assert running.stepped.wait(20)
    threading.Timer(0.1, running.go_on.set).start()
    service.close()
    assert running.wait().kind == "unavailable"
    assert asked(service).wait().kind == "unavailable"


# A folder as a server finds it


PARAMETERS = {
    **Limits(sizes=((64, 64), (128, 64)), max_steps=8, steps=4, guidance_scale=7.5).to_parameters(),
    "slots": "3",
    "threads": "1",
    "backend": "onnxruntime",
}


@pytest.fixture
def folder(toy_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy_bundle, tmp_path / "bundle")
    (tmp_path / "preview.json").write_text(GREY.to_json())
    return tmp_path


def unobserved(stage: str, seconds: float, pictures: int) -> None: ...


def test_a_folder_opens_as_its_parameters_say(
    folder: Path, pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        service, limits = open_service(folder, PARAMETERS, unobserved)
    try:
        assert limits.sizes == ((64, 64), (128, 64))
        assert "64x128 px: evaluations are shared by (2, 4, 6) rows" in caplog.text
        np.testing.assert_array_equal(asked(service).wait()[1], pipeline.draw([order().request])[0])
    finally:
        service.close()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"slots": "0"}, LimitsError, "parameter slots must be at least 1, found 0"),
        ({"slots": "many"}, LimitsError, "parameter slots must be a whole number, found 'many'"),
        ({"threads": "-1"}, LimitsError, "parameter threads must be a whole number, found '-1'"),
        ({"sizes": "64"}, LimitsError, "is not WIDTHxHEIGHT"),
        ({"backend": "abacus"}, EngineError, "backend 'abacus' is unknown: choose auto"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_in_one_sentence(
    folder: Path, change: dict[str, str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        open_service(folder, {**PARAMETERS, **change}, unobserved)


def test_a_damaged_bundle_is_refused(folder: Path) -> None:
    notice = folder / "bundle" / "LICENSE"
    notice.write_text(notice.read_text().swapcase())
    with pytest.raises(BundleError, match="LICENSE was changed or damaged"):
        open_service(folder, PARAMETERS, unobserved)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"preview\.json cannot be read: No such file"),
        ("{", r"preview\.json: is not JSON"),
        (Preview(np.zeros((17, 3), np.float32), 0.0, 1).to_json(), r"preview\.json is of another model"),
    ],
)
def test_a_preview_that_does_not_fit_is_refused(folder: Path, content: str | None, says: str) -> None:
    path = folder / "preview.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BundleError, match=says):
        open_service(folder, PARAMETERS, unobserved)
