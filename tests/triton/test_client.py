"""The client, the command and the documentation's examples on a real server."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_runtime import client_cli
from bksdm_runtime.client import (
    AsyncClient,
    Client,
    GoneError,
    Picture,
    RefusedError,
    Step,
    TimedOutError,
    UnavailableError,
)
from bksdm_runtime.image import read_request
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request
from tests.triton.conftest import MAX_QUEUE, SLOTS
from tests.triton.server import ROOT, Server
from tests.triton.test_server import LONG, steps_stop, until

APPLE = Request("a red apple", seed=7, steps=4)
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("\n## Clients\n")[2].partition("\n## ")[0]


def address(server: Server) -> str:
    return f"127.0.0.1:{server.grpc}"


def test_a_client_draws_what_the_request_makes_alone(server: Server, alone: Pipeline) -> None:
    with Client(address(server)) as client:
        picture = client.draw("a red apple", seed=7)
    np.testing.assert_array_equal(picture.pixels, alone.draw([APPLE])[0])
    assert picture.seed == 7


def test_a_stream_gives_steps_with_previews_and_then_the_same_picture(server: Server, alone: Pipeline) -> None:
    with Client(address(server)) as client:
        *steps, last = client.stream("a red apple", seed=7, preview=True)
    assert [(step.index, step.total) for step in steps if isinstance(step, Step)] == [(i, 5) for i in range(5)]
    assert all(isinstance(step, Step) and np.shape(step.preview) == (16, 16, 3) for step in steps)
    assert isinstance(last, Picture)
    np.testing.assert_array_equal(last.pixels, alone.draw([APPLE])[0])


def test_async_pictures_are_drawn_together_and_each_is_what_it_is_alone(server: Server, alone: Pipeline) -> None:
    async def main() -> list[Picture]:
        async with AsyncClient(address(server)) as client:
            return await asyncio.gather(*(client.draw("a red apple", seed=seed, steps=12) for seed in range(8)))

    before = server.metrics()
    for seed, picture in enumerate(asyncio.run(main())):
        expected = Request("a red apple", seed=seed, steps=12)
        np.testing.assert_array_equal(picture.pixels, alone.draw([expected])[0])
    after = server.metrics()
    name = 'bksdm_stage_count{stage="step"}'
    assert (after["bksdm_steps"] - before["bksdm_steps"]) / (after[name] - before[name]) > 1.5


def test_closing_a_stream_and_a_timeout_stop_the_work(server: Server) -> None:
    with Client(address(server)) as client, closing(client.stream("a", steps=LONG)) as items:
        assert isinstance(next(items), Step)
    assert until(lambda: steps_stop(server), 10)
    with Client(address(server), timeout=0.5) as client, pytest.raises(TimedOutError):
        client.draw("a", steps=LONG)
    assert until(lambda: steps_stop(server), 10)


def test_errors_of_the_server_come_with_their_kind(server: Server) -> None:
    """The limits are the server's own here, so that the core's refusal is what comes back."""
    with Client(address(server)) as client:
        limits = client.limits()
        object.__setattr__(client._limits, "max_steps", 1000)
        with pytest.raises(RefusedError, match=f"^steps must be a whole number from 1 to {LONG}, found 900$"):
            client.draw("a", steps=900)
    assert limits.sizes == ((128, 128), (64, 128))


def test_a_full_server_says_that_it_is(server: Server) -> None:
    waiting = 3 * SLOTS + MAX_QUEUE + 4
    with Client(address(server)) as client, ThreadPoolExecutor(waiting) as pool:
        asked = [pool.submit(client.draw, "a", seed=seed, steps=LONG) for seed in range(waiting)]
        assert until(lambda: any(one.done() for one in asked), 20)
        with pytest.raises(UnavailableError, match="try again later"):
            next(one for one in asked if one.done()).result()
        client.close()
        for one in asked:
            with pytest.raises((UnavailableError, GoneError)):
                one.result(20)
    assert until(lambda: steps_stop(server), 15)


def test_the_command_writes_the_servers_png(
    server: Server, alone: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "apple.png"
    assert client_cli.run(["a red apple", "-o", str(target), "--url", address(server), "--seed", "7", "--stream"]) == 0
    request, provenance = read_request(target)
    assert (request.prompt, request.seed, request.steps) == ("a red apple", 7, 4)
    assert provenance.bundle == alone.bundle.sha256
    with Image.open(target) as found:
        np.testing.assert_array_equal(np.asarray(found), alone.draw([APPLE])[0])


def test_ctrl_c_frees_the_servers_slots(server: Server, tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from bksdm_runtime.client_cli import main; main()"
    command = [sys.executable, "-c", code, "a", "--url", address(server), "--steps", str(LONG), "--count", "4"]
    before = server.metrics()["bksdm_steps"]
    process = subprocess.Popen([*command, "--concurrency", "4"], cwd=tmp_path, stderr=subprocess.PIPE)
    assert until(lambda: server.metrics()["bksdm_steps"] > before + 4, 20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert until(lambda: steps_stop(server), 10)
    assert list(tmp_path.iterdir()) == []


# The page's examples


def examples(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


def run(command: str, folder: Path, server: Server) -> str:
    """A command of the page, its ports this server's."""
    here = command.replace(":8000", f":{server.http}").replace(":8001", f":{server.grpc}")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", here],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_pages_curl_examples_work_as_printed(server: Server, alone: Pipeline, tmp_path: Path) -> None:
    picture, steps = [one for one in examples("bash") if "curl" in one]
    assert "/generate " in picture
    run(picture, tmp_path, server)
    with Image.open(tmp_path / "apple.png") as found:
        np.testing.assert_array_equal(np.asarray(found), alone.draw([APPLE])[0])
    assert "/generate_stream " in steps
    lines = [line for line in run(steps, tmp_path, server).splitlines() if line]
    assert len(lines) == 6  # five evaluations of four PNDM steps, and the picture
    assert all(line.startswith("data: {") for line in lines)
    assert '"step":1' in lines[0]
    assert '"png_b64":"' in lines[-1]


def test_the_pages_commands_work_as_printed(server: Server, tmp_path: Path) -> None:
    [commands] = [one for one in examples("bash") if "bksdm-client" in one]
    printed = run(commands, tmp_path, server).split()
    assert len(printed) == len(set(printed)) == 1 + 16 + 1
    assert all((tmp_path / path).is_file() for path in printed)
    assert any((tmp_path / "steps").iterdir())


def test_the_pages_python_works_as_printed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = examples("python")
    assert len(found) == 2
    for example in found:
        exec(compile(example.replace(":8001", f":{server.grpc}"), "serving.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"apple.png", "car.png", *(f"{i}.png" for i in range(8))}
    for path in tmp_path.iterdir():
        assert Image.open(io.BytesIO(path.read_bytes())).size == (128, 128)
    assert "step 5 of 5" in capsys.readouterr().out
