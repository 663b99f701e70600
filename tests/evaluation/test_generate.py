import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bksdm_evaluation.generate import generate
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline


def test_progress_adds_up_to_the_number_of_pictures_whatever_the_sampler_evaluates():
    told = []
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime", threads=1))
    pictures = generate(
        pipeline,
        ["a red apple", "a dog", "a boat"],
        steps=3,
        guidance_scale=2.0,
        seed=0,
        on_step=told.append,
        batch_size=2,
    )
    assert len(pictures) == 3
    assert sum(told) == pytest.approx(3)
    assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.slow
def test_a_killed_process_leaves_whole_pictures_and_another_goes_on(tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"a red apple {i}\n" for i in range(24)))
    main = "from bksdm_evaluation.cli import main; main()"
    command = [sys.executable, "-c", main, "generate", "--captions", captions]
    command += ["--steps", 2, "--size", 64, "--backend", "onnxruntime", "--threads", 1, "--batch-size", 1]

    def start(folder: str) -> subprocess.Popen[bytes]:
        words = [*map(str, command), "-o", str(tmp_path / folder)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def drawn(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.png")}

    whole = start("whole")
    _, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    for enough in (1, 9):
        process = start("killed")
        until = time.monotonic() + 60
        while len(drawn("killed")) < enough and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for path in (tmp_path / "killed").glob("*.png"):
            with Image.open(path) as picture:
                picture.load()
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.png")}
    assert 9 <= len(there) < 24
    last = start("killed")
    told = last.communicate(timeout=120)[0].decode()
    assert told.startswith(f"{24 - len(there)} pictures drawn, {len(there)} were there")
    assert drawn("killed") == drawn("whole")
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in there} == there
    assert not list((tmp_path / "killed").glob(".*.part"))
