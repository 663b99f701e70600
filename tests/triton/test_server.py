"""The repository on a real server: protocols, company, streams, cancelling, limits, bad input, and a killed stub."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import SAMPLERS
from tests.triton.clients import (
    ALL,
    array_of,
    events,
    fields_of,
    front_fields,
    generate,
    grpc_inputs,
    infer_http,
    picture,
    stream,
)
from tests.triton.conftest import MAX_QUEUE, SLOTS
from tests.triton.server import Server

APPLE = Request("a red apple", seed=7, steps=4)
LONG = 400


def until(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


def is_alive(server: Server) -> bool:
    """A tiny inference, as a liveness probe runs it."""
    content = {"prompt": "", "steps": 1, "height": 64, "width": 128, "seed": 0}
    try:
        return server.post("/v2/models/txt2img/generate", content, timeout=10)[0] == 200
    except OSError:
        return False


# One protocol each


def test_http_infer_gives_the_picture_that_the_request_makes_alone(server: Server, alone: Pipeline) -> None:
    result = infer_http(server, front_fields(APPLE) | {"format": "raw"}, ["image", "seed_used"])
    np.testing.assert_array_equal(result.as_numpy("image"), alone.draw([APPLE])[0])
    assert result.as_numpy("seed_used").tolist() == [7]


def test_unary_grpc_gives_a_png_that_says_how_it_was_made(server: Server, alone: Pipeline) -> None:
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        fields = front_fields(APPLE) | {"format": "png"}
        [content] = client.infer("txt2img", grpc_inputs(fields, batched=False)).as_numpy("png")
    found = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(np.asarray(found), alone.draw([APPLE])[0])
    assert (found.info["prompt"], found.info["seed"], found.info["bundle"]) == ("a red apple", "7", alone.bundle.sha256)


def test_generate_fills_in_what_a_request_leaves_out(server: Server, alone: Pipeline) -> None:
    status, content = server.post("/v2/models/txt2img/generate", {"prompt": "a red apple"})
    assert status == 200
    expected = Request("a red apple", seed=content["seed_used"], steps=4)
    np.testing.assert_array_equal(picture(content["png_b64"]), alone.draw([expected])[0])


def test_generate_stream_gives_each_step_and_then_the_picture(server: Server, alone: Pipeline) -> None:
    with events(server, fields_of(APPLE)) as answers:
        found = list(answers)
    assert [(answer.get("step"), answer.get("of_steps")) for answer in found[:-1]] == [(i, 5) for i in range(1, 6)]
    np.testing.assert_array_equal(picture(found[-1]["png_b64"]), alone.draw([APPLE])[0])
    assert found[-1]["seed_used"] == 7


def test_a_grpc_stream_gives_previews_that_resemble_the_picture(server: Server, alone: Pipeline) -> None:
    [expected] = alone.draw([replace(APPLE, steps=12)])
    with stream(server) as asked:
        asked.ask(fields_of(replace(APPLE, steps=12)) | {"preview": True, "format": "raw"})
        steps, last = asked.picture()
    np.testing.assert_array_equal(last["image"], expected)
    assert len(steps) == 13
    small = steps[-1]["preview_image"]
    assert (small.shape, small.dtype) == ((16, 16, 3), np.uint8)
    scaled_down = expected.reshape(16, 8, 16, 8, 3).mean((1, 3))
    error = np.sqrt(np.mean((small - scaled_down) ** 2))
    assert error < 60  # of 255: 19 on the pictures that the repository's own figure is of


def test_no_preview_comes_where_none_is_asked_for(server: Server) -> None:
    with stream(server) as asked:
        asked.ask(fields_of(APPLE))
        steps, _ = asked.picture()
    assert all(step.keys() == {"step", "of_steps"} for step in steps)


# Company


def test_a_picture_is_the_same_alone_and_in_any_company(server: Server, alone: Pipeline) -> None:
    chosen = random.Random(0)
    requests = [
        Request(
            chosen.choice(["a red apple", "a blue car", "a cat"]),
            negative_prompt=chosen.choice(["", "blurred"]),
            seed=seed,
            steps=chosen.randint(1, 6),
            guidance_scale=chosen.choice([1.0, 2.0, 7.1]),
            height=chosen.choice([128, 128, 64]),
            width=128,
            sampler=chosen.choice(SAMPLERS),
        )
        for seed in range(30)
    ]
    expected = [alone.draw([request])[0] for request in requests]
    before, steps_before = server.statistics("txt2img_core"), server.metrics()
    for clients in (8, 5):
        chosen.shuffle(order := list(range(len(requests))))
        with ThreadPoolExecutor(clients) as pool:
            for i, found in zip(order, pool.map(lambda i: generate(server, requests[i]), order), strict=True):
                np.testing.assert_array_equal(found, expected[i], err_msg=str(requests[i]))
    after, steps_after = server.statistics("txt2img_core"), server.metrics()
    asked = after["inference_count"] - before["inference_count"]
    executed = after["execution_count"] - before["execution_count"]
    assert asked == 2 * len(requests)
    assert executed < asked
    assert max(batch["batch_size"] for batch in after["batch_stats"]) > 1
    name = 'bksdm_stage_count{stage="step"}'
    shared = (steps_after["bksdm_steps"] - steps_before["bksdm_steps"]) / (steps_after[name] - steps_before[name])
    assert shared > 1.5  # pictures an evaluation, of 4 slots: 2.4 measured
    assert steps_after['bksdm_stage_seconds{stage="decode"}'] > steps_before['bksdm_stage_seconds{stage="decode"}']


# Streams that end early


def steps_stop(server: Server) -> bool:
    """For half a second there was no step, and nothing waits."""
    before = server.metrics()["bksdm_steps"]
    time.sleep(0.5)
    after = server.metrics()
    waiting = sum(value for name, value in after.items() if name.startswith("nv_inference_pending_request_count"))
    return after["bksdm_steps"] == before and not waiting


def test_cancelling_a_grpc_stream_stops_the_work_and_frees_its_slots(server: Server, alone: Pipeline) -> None:
    with stream(server) as asked:
        for seed in range(SLOTS):
            asked.ask(fields_of(replace(APPLE, steps=LONG, seed=seed)))
        assert all("step" in asked.answer() for _ in range(2 * SLOTS))
    assert until(lambda: steps_stop(server), 10)
    np.testing.assert_array_equal(generate(server, APPLE), alone.draw([APPLE])[0])


def test_hanging_up_on_events_stops_the_work(server: Server) -> None:
    with events(server, fields_of(replace(APPLE, steps=LONG))) as answers:
        assert next(answers)["step"] == 1
    assert until(lambda: steps_stop(server), 10)


# Limits


def test_a_request_is_refused_when_it_has_waited_too_long_or_the_queue_is_full(server: Server) -> None:
    front = f"127.0.0.1:{server.grpc}"
    with stream(server) as busy, stream(server) as waiting, grpc.InferenceServerClient(front) as client:
        for seed in range(2 * SLOTS):  # those that are drawn, and those that `execute` holds
            busy.ask(fields_of(replace(APPLE, steps=LONG, seed=seed)))
            assert "step" in busy.answer()
        inputs = grpc_inputs(front_fields(APPLE), batched=False)
        with pytest.raises(InferenceServerException, match="timeout expired") as refused:
            client.infer("txt2img", inputs, timeout=300_000)  # microseconds
        assert "UNAVAILABLE" in str(refused.value.status())
        for seed in range(2 * SLOTS + MAX_QUEUE):
            waiting.ask(fields_of(replace(APPLE, seed=seed)))
        with pytest.raises(InferenceServerException, match="maximum queue size"):
            waiting.answer()
        status, content = server.post("/v2/models/txt2img/infer", tensors())
        assert status == 503, content
        assert "maximum queue size" in content["error"]
        assert says_nothing_of_the_machine(content["error"])
        status, content = server.post("/v2/models/txt2img/generate", {"prompt": "a"})
        assert status == 400, content  # whatever the code is: `/generate` has no other (Triton 2.51)
        assert "maximum queue size" in content["error"]
    assert until(lambda: steps_stop(server), 15)
    assert is_alive(server)


# Bad input

BAD = {
    "a prompt of 100 kB": ({"prompt": "x" * 100_000}, "prompt must have at most 8,192 bytes, found 100,000"),
    "invalid UTF-8": ({"prompt": b"caf\xe9"}, "prompt is not valid UTF-8: byte 3 is 0xe9"),
    "a NUL": ({"prompt": "a\0b"}, "prompt holds a NUL character"),
    "NaN guidance": ({"guidance_scale": np.nan}, "guidance_scale must be a number from 1 to 1000"),
    "infinite guidance": ({"guidance_scale": np.inf}, "guidance_scale must be a number from 1 to 1000"),
    "negative steps": ({"steps": -3}, "steps must be a whole number from 1 to 400, found -3"),
    "too many steps": ({"steps": 401}, "steps must be a whole number from 1 to 400, found 401"),
    "an odd size": (
        {"height": 129},
        "height 129 and width 128 are not served: choose width x height 128x128 or 128x64",
    ),
    "a size of nothing": ({"width": 0}, "height 128 and width 0 are not served"),
    "an unknown sampler": ({"sampler": "lms"}, "sampler 'lms' is unknown: choose pndm"),
    "code for a sampler": ({"sampler": "__import__('os').system('ls')"}, "is unknown: choose pndm"),
    "a path for a format": ({"format": "../../etc/passwd"}, "is unknown: choose png, png_b64, raw"),
}


def says_nothing_of_the_machine(message: str) -> bool:
    return not re.search(r"Traceback|\.py|/tmp|/home|/root|File \"|line \d", message)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_by_front_and_core_with_field_value_and_range(server: Server, name: str) -> None:
    change, says = BAD[name]
    fields = {**ALL, "prompt": "a red apple", **change}
    with stream(server) as asked:
        asked.ask(fields)
        with pytest.raises(InferenceServerException) as refused:
            asked.answer()
    assert says in str(refused.value.message())
    assert says_nothing_of_the_machine(str(refused.value))
    del fields["preview"]
    with pytest.raises(InferenceServerException) as refused:
        infer_http(server, fields, ["png_b64"])
    assert says in str(refused.value.message())
    assert says_nothing_of_the_machine(str(refused.value))
    assert "400" in str(refused.value.status())


BODIES: dict[str, Any] = {
    "nothing": b"",
    "no JSON": b"{",
    "no prompt": {"steps": 3},
    "a prompt that is a number": {"prompt": 3},
    "a prompt that is a list": {"prompt": ["a", "b"]},
    "steps that are text": {"prompt": "a", "steps": "3"},
    "steps past 32 bits": {"prompt": "a", "steps": 2**40},
    "a negative seed": {"prompt": "a", "seed": -1},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused(server: Server, name: str) -> None:
    status, content = server.post("/v2/models/txt2img/generate", BODIES[name])
    # Triton answers 500 to what it cannot parse, and none of it reaches a model.
    assert (status == 400) or (status == 500 and "pars" in content["error"]), content
    assert says_nothing_of_the_machine(str(content))


def tensors(**changes: Any) -> dict[str, Any]:
    """The body of an `/infer` of the front; a change is a whole input, None leaves it out."""
    inputs = {"prompt": {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}, **changes}
    return {"inputs": [one for one in inputs.values() if one is not None]}


@pytest.mark.parametrize(
    "body",
    [
        tensors(prompt=None),
        tensors(steps={"name": "steps", "datatype": "FP32", "shape": [1], "data": [3.5]}),
        tensors(steps={"name": "steps", "datatype": "INT32", "shape": [2], "data": [3, 4]}),
        tensors(prompt={"name": "prompt", "datatype": "BYTES", "shape": [0], "data": []}),
        tensors(init_image={"name": "init_image", "datatype": "BYTES", "shape": [1], "data": ["/etc/passwd"]}),
        tensors(preview={"name": "preview", "datatype": "BOOL", "shape": [1], "data": [True]}),
    ],
    ids=["no prompt", "a wrong dtype", "two values", "an empty tensor", "an unknown field", "a preview of the front"],
)
def test_tensors_that_are_no_request_are_refused(server: Server, body: dict[str, Any]) -> None:
    status, content = server.post("/v2/models/txt2img/infer", body)
    assert status == 400, content
    assert says_nothing_of_the_machine(str(content))


def test_a_core_that_is_asked_for_less_than_all_fields_says_which_is_missing(server: Server) -> None:
    fields = fields_of(APPLE)
    del fields["seed"]
    with stream(server) as asked:
        asked.ask(fields)
        with pytest.raises(InferenceServerException, match="10 inputs"):
            asked.answer()


def test_an_unknown_field_of_generate_changes_nothing(server: Server, alone: Pipeline) -> None:
    """Triton drops it in silence."""
    fields = front_fields(APPLE) | {"init_image": "/etc/passwd"}
    _, content = server.post("/v2/models/txt2img/generate", fields)
    np.testing.assert_array_equal(picture(content["png_b64"]), alone.draw([APPLE])[0])


# What an operator does, and what happens to one


def test_metrics_tell_every_stage(server: Server) -> None:
    generate(server, APPLE)
    found = server.metrics()
    for stage in ("queue", "text", "step", "decode", "encode"):
        assert found[f'bksdm_stage_count{{stage="{stage}"}}'] > 0
        assert found[f'bksdm_stage_seconds{{stage="{stage}"}}'] > 0
    assert Counter(name.partition("{")[0] for name in found)["nv_inference_request_success"] == 2


def test_a_damaged_bundle_is_refused_by_a_load_in_one_sentence(server: Server, repository: Path) -> None:
    notice = repository / "txt2img_core" / "1" / "bundle" / "LICENSE"
    before = notice.read_bytes()
    notice.write_bytes(before.swapcase())
    try:
        status, content = server.post("/v2/repository/models/txt2img_core/load")
        assert status == 400
        assert "LICENSE was changed or damaged" in content["error"]
        assert "Traceback" not in server.said()
    finally:
        notice.write_bytes(before)
    assert is_alive(server)


def test_a_killed_stub_fails_a_tiny_inference_and_a_load_brings_it_back(server: Server, alone: Pipeline) -> None:
    [stub] = server.stubs("txt2img_core")
    assert is_alive(server)
    os.kill(stub, signal.SIGKILL)
    assert until(lambda: not is_alive(server), 20)
    assert server.status("/v2/health/ready") == 200  # which is why a probe must draw something
    status, content = server.post("/v2/repository/models/txt2img_core/load")
    assert status == 200, content
    assert until(lambda: is_alive(server), 30)
    np.testing.assert_array_equal(generate(server, APPLE), alone.draw([APPLE])[0])
    assert server.metrics()['bksdm_stage_count{stage="step"}'] > 0
    assert array_of("seed", 3).dtype == np.uint64
