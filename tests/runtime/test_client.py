"""What a client makes of a server's answers and errors, on a stand-in that speaks its gRPC; see tests/triton for a
real one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import click
import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as stubs

from bksdm_runtime import client_cli
from bksdm_runtime.client import (
    AsyncClient,
    Client,
    ClientError,
    FailedError,
    GoneError,
    Picture,
    RefusedError,
    Step,
    TimedOutError,
    UnavailableError,
)
from bksdm_runtime.served_request import DTYPES, FIELDS, Limits

LIMITS = Limits(sizes=((128, 128), (64, 128)), max_steps=50, steps=4, guidance_scale=2.0)
PNG = b"\x89PNG\r\n\x1a\nnot much of one"
Answers = Callable[["StandIn", dict[str, Any], Any], Iterator[Any]]


def answer(**tensors: Any) -> Any:
    """A response of the core: numbers [1, 1], bytes, or an array."""
    response = messages.ModelInferResponse(model_name="txt2img_core")
    for name, value in tensors.items():
        tensor = response.outputs.add()
        tensor.name = name
        if isinstance(value, bytes):
            tensor.datatype, shape, raw = "BYTES", [1, 1], len(value).to_bytes(4, "little") + value
        elif isinstance(value, np.ndarray):
            tensor.datatype, shape, raw = "UINT8", [1, *value.shape], value.tobytes()
        else:
            wide = name == "seed_used"
            tensor.datatype, shape = ("UINT64", [1, 1]) if wide else ("INT32", [1, 1])
            raw = np.array(value, DTYPES[tensor.datatype]).tobytes()
        tensor.shape.extend(shape)
        response.raw_output_contents.append(raw)
    return messages.ModelStreamInferResponse(infer_response=response)


def draws(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    if "step" in server.wanted:
        small = {"preview_image": np.full((2, 3, 3), 9, np.uint8)} if fields["preview"] else {}
        for i in range(fields["steps"]):
            yield answer(step=i + 1, of_steps=fields["steps"], **small)
    yield answer(png=PNG, seed_used=fields["seed"])


def is_full(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.UNAVAILABLE, "[request id: 0] Exceeds maximum queue size")
    yield


def refuses(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "steps 1 is too few for this schedule")
    yield


def loses(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.INTERNAL, "the picture is lost: the server's log says why")
    yield


def is_dead(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.INTERNAL, "Stub process 'txt2img_core_0_0' is not healthy.")
    yield


def ends_early(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    yield answer(step=1, of_steps=4)


def knows_no_codes(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    yield messages.ModelStreamInferResponse(error_message="something broke")


def is_full_without_a_code(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    """As Triton 2.51 tells of its queue, whatever the stream asked for."""
    yield messages.ModelStreamInferResponse(error_message="[request id: <id_unknown>] Exceeds maximum queue size")


def never_ends(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
    context.add_callback(server.hung_up.set)
    yield answer(step=1, of_steps=4)
    server.hung_up.wait(30)


@dataclass
class StandIn(stubs.GRPCInferenceServiceServicer):
    answers: Answers = draws
    parameters: dict[str, str] = field(default_factory=LIMITS.to_parameters)
    asked: list[dict[str, Any]] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    hung_up: Event = field(default_factory=Event)
    address: str = ""

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        response = messages.ModelConfigResponse()
        for name, value in self.parameters.items():
            response.config.parameters[name].string_value = value
        return response

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        for request in request_iterator:
            fields: dict[str, Any] = {}
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
                assert list(tensor.shape) == [1, 1]
                assert tensor.datatype == FIELDS[tensor.name].datatype
                is_text = tensor.datatype == "BYTES"
                fields[tensor.name] = raw[4:].decode() if is_text else np.frombuffer(raw, DTYPES[tensor.datatype])[0]
            self.asked.append(fields)
            self.wanted = [output.name for output in request.outputs]
            yield from self.answers(self, fields, context)


@contextmanager
def standing_in(answers: Answers = draws, **changes: Any) -> Iterator[StandIn]:
    standin = StandIn(answers, **changes)
    server = grpc.server(ThreadPoolExecutor(8))
    stubs.add_GRPCInferenceServiceServicer_to_server(standin, server)
    standin.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield standin
    finally:
        standin.hung_up.set()
        server.stop(0).wait()


# What is asked, and what comes back


def test_the_core_is_asked_for_every_field_with_the_servers_defaults() -> None:
    with standing_in() as server, Client(server.address) as client:
        assert client.draw("a red apple", seed=7, sampler="euler") == Picture(PNG, 7)
        assert client.limits() == LIMITS
    [fields] = server.asked
    assert fields.keys() == FIELDS.keys()
    assert (fields["prompt"], fields["seed"], fields["sampler"]) == ("a red apple", 7, "euler")
    assert (fields["steps"], fields["guidance_scale"], fields["height"], fields["width"]) == (4, 2.0, 128, 128)
    assert server.wanted == ["png", "seed_used"]  # steps would be sent for nothing


def test_a_seed_that_is_left_out_is_another_each_time() -> None:
    with standing_in() as server, Client(server.address) as client:
        assert client.draw("a").seed != client.draw("a", seed=None).seed


def test_a_stream_gives_each_step_and_then_the_picture() -> None:
    with standing_in() as server, Client(server.address) as client:
        *steps, last = client.stream("a red apple", seed=7, steps=3)
        assert steps == [Step(i, 3, None) for i in range(3)]
        assert last == Picture(PNG, 7)
        *steps, _ = client.stream("a red apple", preview=True)
    assert [step.preview.shape for step in steps if isinstance(step, Step) and step.preview is not None] == [
        (2, 3, 3)
    ] * 4


def test_closing_a_stream_hangs_up() -> None:
    with standing_in(never_ends) as server, Client(server.address) as client:
        with closing(client.stream("a")) as items:
            assert next(items) == Step(0, 4, None)
        assert server.hung_up.wait(10)


def test_one_client_serves_many_threads() -> None:
    with standing_in() as server, Client(server.address) as client, ThreadPoolExecutor(8) as pool:
        assert [one.seed for one in pool.map(lambda seed: client.draw("a", seed=seed), range(40))] == list(range(40))


def test_the_async_client_gives_the_same() -> None:
    async def main(address: str) -> None:
        async with AsyncClient(address) as client:
            assert await client.limits() == LIMITS
            pictures = await asyncio.gather(*(client.draw("a", seed=seed) for seed in range(8)))
            assert [one.seed for one in pictures] == list(range(8))
            assert [one async for one in client.stream("a", seed=7, steps=2)] == [
                Step(0, 2, None),
                Step(1, 2, None),
                Picture(PNG, 7),
            ]

    with standing_in() as server:
        asyncio.run(main(server.address))


def test_an_async_stream_hangs_up_when_it_is_closed_and_a_draw_when_its_task_is_cancelled() -> None:
    async def close(address: str) -> None:
        async with AsyncClient(address) as client, aclosing(client.stream("a")) as items:
            assert await anext(items) == Step(0, 4, None)

    async def cancel(address: str) -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.draw("a"), 0.5)

    for end in (close, cancel):
        with standing_in(never_ends) as server:
            asyncio.run(end(server.address))
            assert server.hung_up.wait(10)


# Errors

ERRORS: dict[str, tuple[Answers, type[ClientError], str]] = {
    "full": (is_full, UnavailableError, "try again later: .*Exceeds maximum queue size"),
    "full, without a code": (is_full_without_a_code, UnavailableError, "try again later: .*Exceeds maximum queue"),
    "refused": (refuses, RefusedError, "^steps 1 is too few for this schedule$"),
    "lost": (loses, FailedError, "the picture is lost"),
    "dead": (is_dead, UnavailableError, "try again later: Stub process .* is not healthy"),
    "no picture": (ends_early, FailedError, "the server ended without a picture"),
    "no codes": (knows_no_codes, FailedError, "something broke"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_server_is_one_of_ours(name: str) -> None:
    answers, kind, says = ERRORS[name]

    async def draw(address: str) -> None:
        async with AsyncClient(address) as client:
            await client.draw("a")

    with standing_in(answers) as server, Client(server.address) as client:
        with pytest.raises(kind, match=says):
            client.draw("a")
        with pytest.raises(kind, match=says):
            list(client.stream("a"))
        with pytest.raises(kind, match=says):
            asyncio.run(draw(server.address))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 51}, "steps must be a whole number from 1 to 50, found 51"),
        ({"steps": 2.5}, "steps must be INT32, found 2.5"),
        ({"steps": True}, "steps must be INT32, found True"),
        ({"steps": 2**40}, "steps does not fit INT32"),
        ({"seed": -1}, "seed does not fit UINT64, found -1"),
        ({"height": 100}, "height 100 and width 128 are not served: choose width x height 128x128 or 128x64"),
        ({"sampler": "lms"}, "sampler 'lms' is unknown"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 1 to 1000"),
        ({"negative_prompt": "\ud800"}, "negative_prompt is not valid Unicode text"),
    ],
)
def test_a_request_past_the_servers_limits_is_refused_before_it_is_sent(fields: dict[str, Any], says: str) -> None:
    with standing_in() as server, Client(server.address) as client:
        with pytest.raises(RefusedError, match=says):
            client.draw("a", **fields)
        assert server.asked == []


def test_a_field_that_there_is_not_is_a_type_error() -> None:
    with (
        standing_in() as server,
        Client(server.address) as client,
        pytest.raises(TypeError, match="stesp is no field of a request"),
    ):
        client.draw("a", stesp=3)  # type: ignore[arg-type]


def test_a_picture_that_takes_too_long_is_dropped() -> None:
    with standing_in(never_ends) as server, Client(server.address, timeout=0.5) as client:
        with pytest.raises(TimedOutError, match=r"no picture within 0\.5 s"):
            client.draw("a")
        assert server.hung_up.wait(10)


def test_no_server_and_a_server_that_goes_are_told_apart_from_a_full_one() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(GoneError, match=r"^127\.0\.0\.1:1 cannot be reached: "):
        client.draw("a")


def test_closing_a_client_ends_what_other_threads_wait_for() -> None:
    with standing_in(never_ends) as server, ThreadPoolExecutor(1) as pool:
        client = Client(server.address)
        waiting = pool.submit(client.draw, "a")
        while not server.asked:
            server.hung_up.wait(0.02)
        client.close()
        with pytest.raises(GoneError, match="the connection was closed under the picture"):
            waiting.result(10)


def test_closing_an_async_client_ends_what_other_tasks_wait_for() -> None:
    async def main(server: StandIn) -> None:
        client = AsyncClient(server.address)
        waiting = asyncio.create_task(client.draw("a"))
        while not server.asked:
            await asyncio.sleep(0.02)
        await client.close()
        with pytest.raises(GoneError, match="this client is closed"):
            await asyncio.wait_for(waiting, 10)

    with standing_in(never_ends) as server:
        asyncio.run(main(server))


def test_a_closed_client_says_that_it_is() -> None:
    async def after_closing(address: str) -> None:
        client = AsyncClient(address)
        if knows_limits:
            await client.limits()
        await client.close()
        await client.draw("a")

    for knows_limits in (False, True):
        with standing_in() as server:
            client = Client(server.address)
            if knows_limits:
                client.limits()
            client.close()
            with pytest.raises(GoneError, match="this client is closed"):
                client.draw("a")
            with pytest.raises(GoneError, match="this client is closed"):
                asyncio.run(after_closing(server.address))


def test_a_server_of_another_repository_is_said_to_be_one() -> None:
    with (
        standing_in(parameters={}) as server,
        Client(server.address) as client,
        pytest.raises(FailedError, match="is not of a repository by bksdm-triton: parameter sizes is missing"),
    ):
        client.draw("a")


def test_an_address_of_http_is_refused() -> None:
    with pytest.raises(ValueError, match="is no address of gRPC"):
        Client("http://127.0.0.1:8000")


def test_headers_go_with_every_call() -> None:
    seen: list[dict[str, str]] = []

    def notes(server: StandIn, fields: dict[str, Any], context: Any) -> Iterator[Any]:
        seen.append(dict(context.invocation_metadata()))
        yield from draws(server, fields, context)

    with standing_in(notes) as server, Client(server.address, headers={"authorization": "Bearer x"}) as client:
        client.draw("a")
    assert seen[0]["authorization"] == "Bearer x"


# The command


def test_the_command_writes_the_servers_file_and_prints_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "apple.png"
    with standing_in() as server:
        assert client_cli.run(["a red apple", "-o", str(target), "--url", server.address, "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_bytes() == PNG
    assert [path.name for path in target.parent.iterdir()] == ["apple.png"]
    assert server.asked[0]["seed"] == 3


def test_several_pictures_have_rising_seeds_and_their_paths_come_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with standing_in() as server:
        arguments = ["a red apple", "--count", "9", "--concurrency", "4", "--seed", "5", "--url", server.address]
        assert client_cli.run([*arguments, "-o", str(tmp_path / "{index}-{seed}")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{i}-{i + 5}.png") for i in range(9)]
    assert sorted(one["seed"] for one in server.asked) == list(range(5, 14))


def test_previews_are_files_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with standing_in() as server:
        arguments = ["a", "--url", server.address, "-o", str(tmp_path / "a.png"), "--preview", str(tmp_path / "steps")]
        assert client_cli.run([*arguments, "--steps", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["a-001.png", "a-002.png"]


@pytest.mark.parametrize(
    ("answers", "arguments", "code", "says"),
    [
        (draws, ["--steps", "99"], 2, "steps must be a whole number from 1 to 50, found 99"),
        (draws, ["-o", "a.jpg"], 2, "-o must end in .png"),
        (draws, ["--seed", "-1"], 2, "Invalid value for '--seed'"),
        (draws, ["--seed", str(2**64 - 1), "--count", "2"], 2, "seeds go up to"),
        (draws, ["--url", "http://x"], 2, "is no address of gRPC"),
        (draws, ["--url", "127.0.0.1:1"], 1, "127.0.0.1:1 cannot be reached"),
        (is_full, [], 1, "try again later"),
        (ends_early, ["--stream"], 1, "ended without a picture"),
        (never_ends, ["--timeout", "0.5"], 1, "no picture within 0.5 s"),
    ],
)
def test_misuse_and_failure_are_one_sentence_and_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: Answers,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with standing_in(answers) as server:
        assert client_cli.run(["a", "--url", server.address, *arguments]) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_130_and_hangs_up(tmp_path: Path) -> None:
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from bksdm_runtime.client_cli import main; main()"
    with standing_in(never_ends) as server:
        command = [sys.executable, "-c", script, "a", "--url", server.address, "--count", "3", "--concurrency", "3"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while not server.asked and process.poll() is None:
            server.hung_up.wait(0.05)
        process.send_signal(2)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "bksdm-client: interrupted" in said
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_one_sentence_and_help_needs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [one for one in sys.modules if one.startswith("bksdm_runtime.client") and one != client_cli.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    assert client_cli.run(["--help"]) == 0
    capsys.readouterr()
    assert client_cli.run(["a red apple"]) == 2
    assert capsys.readouterr().err == "bksdm-client: needs grpc: pip install 'bksdm[triton]'\n"


def test_every_option_has_help() -> None:
    options = [one for one in client_cli.command.params if isinstance(one, click.Option)]
    assert all(one.help for one in options if one.name != "version")
