"""Pictures in flight against the same pictures alone, to the last pixel, in every company."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bksdm_runtime import bundle as bundles
from bksdm_runtime import inflight
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.inflight import Drawn, Event, Failed, InFlight, Stepped
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request, RequestError
from bksdm_runtime.schedule import SAMPLERS

ONE = EngineSettings(backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def pipeline(make_toy_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.open(make_toy_bundle(tmp_path_factory.mktemp("cached") / "bundle", step_cache=True), ONE)


class Wrapped:
    """An engine that notes its calls' rows and may change what comes out."""

    def __init__(self, engine: Any, change: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]]) -> None:
        self.engine, self.change = engine, change
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        self.rows.append(len(next(iter(inputs.values()))))
        return self.change(inputs, self.engine(inputs))


def wrapped(
    pipeline: Pipeline, component: str = "unet", change: Callable[..., dict[str, Any]] = lambda _, outputs: outputs
) -> tuple[Pipeline, Wrapped]:
    """The same pipeline with one engine wrapped."""
    engine = Wrapped(pipeline.engine(component), change)
    engines = {name: pipeline.engine(name) for name in pipeline.bundle.manifest.components}
    return Pipeline(pipeline.bundle, ONE, pipeline._tokenizer, {**engines, component: engine}), engine


def finish(under_way: InFlight) -> list[Event]:
    events: list[Event] = []
    while len(under_way):
        events += under_way.advance()
    return events


def pictures(events: Sequence[Event]) -> dict[int, NDArray[np.uint8]]:
    return {event.ticket: event.pixels for event in events if isinstance(event, Drawn)}


def any_request(chosen: random.Random, sizes: Sequence[tuple[int, int]], most_steps: int) -> Request:
    height, width = chosen.choice(sizes)
    return Request(
        prompt=chosen.choice(["a red apple", "a blue car", "", "a house " * 40]),
        negative_prompt=chosen.choice(["", "blurred", "red"]),
        seed=chosen.randrange(2**64),
        steps=chosen.randint(1, most_steps),
        guidance_scale=chosen.choice([1.0, 1.5, 7.5, None]),
        height=height,
        width=width,
        sampler=chosen.choice(SAMPLERS),
    )


def saving(chosen: random.Random, request: Request) -> Request:
    return replace(
        request,
        guidance_interval=chosen.choice([(0.0, 1.0), (0.2, 0.8)]),
        cache_interval=chosen.choice([1, 1, 3]),
        vae_tile=chosen.choice([None, None, 192]),
    )


def mixed(under_way: InFlight, requests: Sequence[Request], chosen: random.Random) -> None:
    """Admit the requests at random moments, cancel some on the way, and hold every picture against itself alone."""
    waiting = list(enumerate(requests))
    asked: dict[int, int] = {}
    cancelled: set[int] = set()
    events: list[Event] = []
    while waiting or len(under_way):
        while waiting and len(under_way) < under_way.slots and chosen.random() < 0.6:
            position, request = waiting.pop(0)
            asked[under_way.admit(request)] = position
        events += under_way.advance()
        if chosen.random() < 0.03 and asked:
            ticket = chosen.choice(list(asked))
            if ticket not in pictures(events):
                under_way.cancel(ticket)
                cancelled.add(ticket)
    drawn = pictures(events)
    assert drawn.keys() == asked.keys() - cancelled
    for ticket, pixels in drawn.items():
        request = requests[asked[ticket]]
        [alone] = under_way.pipeline.draw([request])
        np.testing.assert_array_equal(pixels, alone, err_msg=str(request))


@pytest.mark.parametrize("seed", range(25))
def test_a_picture_is_the_same_in_any_company(pipeline: Pipeline, seed: int) -> None:
    chosen = random.Random(seed)
    sizes = [(64, 64), (64, 64), (128, 256)]
    requests = [saving(chosen, any_request(chosen, sizes, 7)) for _ in range(12)]
    mixed(InFlight(pipeline, slots=chosen.randint(1, 6)), requests, chosen)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("seed", range(2))
def test_a_picture_of_the_demo_is_the_same_in_any_company(
    demo: Callable[[str], Pipeline], backend: str, seed: int
) -> None:
    pipeline = demo(backend)
    chosen = random.Random(seed)
    sizes = [(128, 128), (64, 128)] if backend == "onnxruntime" else [(128, 128)]  # the other one compiles for each
    requests = [any_request(chosen, sizes, 4) for _ in range(8)]
    if pipeline.arithmetic == "bf16":  # a single row has kernels of its own there: see rows.py
        requests = [replace(request, guidance_scale=request.guidance_scale or 2.0) for request in requests]
        requests = [replace(request, guidance_scale=max(1.5, request.guidance)) for request in requests]
    mixed(InFlight(pipeline, slots=4), requests, chosen)


@pytest.fixture(scope="module")
def demo() -> Callable[[str], Pipeline]:
    opened: dict[str, Pipeline] = {}

    def open_demo(backend: str) -> Pipeline:
        if backend not in opened:
            settings = EngineSettings(backend=backend, threads=1, kept_shapes=6)
            opened[backend] = Pipeline.open(bundles.demo(), settings)
        return opened[backend]

    return open_demo


def test_an_unguided_picture_has_the_same_pixels_alone_and_beside_others(demo: Callable[[str], Pipeline]) -> None:
    pipeline = demo("openvino")
    request = Request("a red apple", steps=3, guidance_scale=1.0, seed=5)
    alone = InFlight(pipeline, slots=4)
    alone.admit(request)
    [expected] = pictures(finish(alone)).values()
    company = InFlight(pipeline, slots=4)
    ticket = company.admit(request)
    for seed in range(3):
        company.admit(Request("a blue car", steps=2 + seed, seed=seed))
    np.testing.assert_array_equal(pictures(finish(company))[ticket], expected)


def test_pictures_of_different_steps_share_evaluations(pipeline: Pipeline) -> None:
    told, unet = wrapped(pipeline)
    under_way = InFlight(told, slots=3)
    under_way.counts(64, 64)
    unet.rows.clear()
    for steps in (2, 4, 3):
        under_way.admit(Request("a red apple", steps=steps, sampler="ddim"))
    finish(under_way)
    assert unet.rows == [6, 6, 4, 2]


def test_one_that_comes_later_joins_those_under_way(pipeline: Pipeline) -> None:
    told, unet = wrapped(pipeline)
    under_way = InFlight(told, slots=2)
    under_way.counts(64, 64)
    unet.rows.clear()
    under_way.admit(Request("a red apple", steps=3, sampler="ddim"))
    under_way.advance()
    under_way.admit(Request("a blue car", steps=2, sampler="euler"))
    finish(under_way)
    assert unet.rows == [2, 4, 4]


def test_a_guided_and_an_unguided_picture_share_an_evaluation_of_an_even_number_of_rows(pipeline: Pipeline) -> None:
    told, unet = wrapped(pipeline)
    under_way = InFlight(told, slots=2)
    under_way.counts(64, 64)
    unet.rows.clear()
    under_way.admit(Request("a red apple", steps=1, sampler="ddim"))
    under_way.admit(Request("a red apple", steps=2, sampler="ddim", guidance_scale=1))
    finish(under_way)
    assert unet.rows == [4, 2]


def test_rows_that_differ_in_company_are_not_shared(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    def rounds_in_company(inputs: Mapping[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        if len(inputs["sample"]) in (4, 8):
            return {**outputs, "out_sample": np.nextafter(outputs["out_sample"], np.float32(9))}
        return outputs

    told, unet = wrapped(pipeline, change=rounds_in_company)
    under_way = InFlight(told, slots=4)
    assert under_way.counts(64, 64) == (2, 6)
    assert "4 rows" in caplog.text
    assert "not equal bit for bit" in caplog.text
    unet.rows.clear()
    for seed in range(4):
        under_way.admit(Request("a red apple", steps=1, sampler="ddim", seed=seed))
    drawn = pictures(finish(under_way))
    assert unet.rows == [6, 2]
    for ticket, pixels in drawn.items():
        np.testing.assert_array_equal(
            pixels, pipeline.draw([Request("a red apple", steps=1, sampler="ddim", seed=ticket - 1)])[0]
        )


def test_where_places_differ_every_picture_is_evaluated_alone(pipeline: Pipeline) -> None:
    def rounds_in_second_place(inputs: Mapping[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        outputs["out_sample"][1::2] = np.nextafter(outputs["out_sample"][1::2], np.float32(9))
        return outputs

    told, unet = wrapped(pipeline, change=rounds_in_second_place)
    under_way = InFlight(told, slots=4)
    assert under_way.counts(64, 64) == ()
    unet.rows.clear()
    requests = [Request("a red apple", steps=1, sampler="ddim", guidance_scale=scale) for scale in (1, 1, 2)]
    drawn = [under_way.admit(request) for request in requests]
    found = pictures(finish(under_way))
    assert unet.rows == [1, 1, 2]
    for ticket, request in zip(drawn, requests, strict=True):
        np.testing.assert_array_equal(found[ticket], told.draw([request])[0])


def test_no_size_starves_another(pipeline: Pipeline) -> None:
    under_way = InFlight(pipeline, slots=4)
    large = [under_way.admit(Request("a", steps=40, height=128, width=128, sampler="ddim")) for _ in range(3)]
    small = under_way.admit(Request("a", steps=3, sampler="ddim"))
    turns = [{event.ticket for event in under_way.advance()} for _ in range(8)]
    assert turns == [set(large), {small}] * 4


def test_a_step_says_which_of_how_many_it_was(pipeline: Pipeline) -> None:
    under_way = InFlight(pipeline, slots=1)
    ticket = under_way.admit(Request("a red apple", steps=2, sampler="pndm"))
    steps = [event for event in finish(under_way) if isinstance(event, Stepped)]
    assert [(step.ticket, step.index, step.total) for step in steps] == [(ticket, i, 3) for i in range(3)]
    assert steps[0].latents.shape == (4, 8, 8)


def test_a_cancelled_picture_frees_its_slot_and_leaves_the_others_alone(pipeline: Pipeline) -> None:
    under_way = InFlight(pipeline, slots=2)
    first, second = (under_way.admit(Request("a red apple", steps=3, seed=seed)) for seed in range(2))
    under_way.advance()
    under_way.cancel(first)
    under_way.cancel(first)
    assert len(under_way) == 1
    third = under_way.admit(Request("a red apple", steps=3, seed=2))
    drawn = pictures(finish(under_way))
    assert drawn.keys() == {second, third}
    for ticket, seed in ((second, 1), (third, 2)):
        np.testing.assert_array_equal(drawn[ticket], pipeline.draw([Request("a red apple", steps=3, seed=seed)])[0])


def test_no_more_are_admitted_than_there_are_slots(pipeline: Pipeline) -> None:
    under_way = InFlight(pipeline, slots=1)
    under_way.admit(Request("a red apple", steps=1))
    with pytest.raises(EngineError, match="all 1 slots are taken"):
        under_way.admit(Request("a red apple", steps=1))


def test_what_cannot_be_served_is_refused_when_it_comes(pipeline: Pipeline) -> None:
    under_way = InFlight(pipeline, slots=1)
    with pytest.raises(RequestError, match="multiples of"):
        under_way.admit(Request("a red apple", height=72))
    assert len(under_way) == 0


def test_a_failed_evaluation_loses_the_pictures_that_shared_it_alone(pipeline: Pipeline) -> None:
    failing: list[bool] = []

    def fail(inputs: Mapping[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        if failing and inputs["sample"].shape[2] == 16:
            raise EngineError("out of memory")
        return outputs

    told, _ = wrapped(pipeline, change=fail)
    under_way = InFlight(told, slots=3)
    lost = [under_way.admit(Request("a", steps=3, height=128, width=128, seed=seed)) for seed in range(2)]
    kept = under_way.admit(Request("a", steps=3))
    under_way.advance()
    failing.append(True)
    events = finish(under_way)
    assert [(event.ticket, str(event.error)) for event in events if isinstance(event, Failed)] == [
        (ticket, "out of memory") for ticket in lost
    ]
    assert pictures(events).keys() == {kept}


def test_a_picture_that_overflows_is_lost_alone(pipeline: Pipeline) -> None:
    def overflow(inputs: Mapping[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        outputs["out_sample"][inputs["timestep"] == 901] = np.nan  # the first of ten steps
        return outputs

    told, _ = wrapped(pipeline, change=overflow)
    under_way = InFlight(told, slots=2)
    lost = under_way.admit(Request("a", steps=10, sampler="ddim"))
    kept = under_way.admit(Request("a", steps=3, sampler="ddim"))
    events = finish(under_way)
    assert [event.ticket for event in events if isinstance(event, Failed)] == [lost]
    assert pictures(events).keys() == {kept}


def test_a_prompt_is_encoded_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "_KEPT_CONTEXTS", 2)
    told, text_encoder = wrapped(pipeline, "text_encoder")
    under_way = InFlight(told, slots=4)
    for prompt in ("a", "b", "a", "c"):
        under_way.admit(Request(prompt, guidance_scale=1, steps=1))
    assert len(text_encoder.rows) == 3
    finish(under_way)
    under_way.admit(Request("b", guidance_scale=1, steps=1))  # the one not used for longest was forgotten
    assert len(text_encoder.rows) == 4


def test_image_to_image_is_the_same_in_company(pipeline: Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    request = Request("a", steps=5, init_image=picture, strength=0.6, seed=3)
    under_way = InFlight(pipeline, slots=2)
    ticket = under_way.admit(request)
    under_way.admit(Request("b", steps=4))
    np.testing.assert_array_equal(pictures(finish(under_way))[ticket], pipeline.draw([request])[0])


def test_its_work_is_told(pipeline: Pipeline) -> None:
    told: list[tuple[str, int]] = []
    under_way = InFlight(pipeline, slots=2, observe=lambda stage, seconds, count: told.append((stage, count)))
    for _ in range(2):
        under_way.admit(Request("a", negative_prompt="b", steps=1, sampler="ddim"))
    finish(under_way)
    assert told == [("text", 1), ("text", 1), ("step", 2), ("decode", 1), ("decode", 1)]
