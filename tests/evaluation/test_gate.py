"""The gate passes what is only rounded, and catches planted faults: with the demo, 16 pairs of 10 steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm import checkpoint
from bksdm.checkpoint import Checkpoint
from bksdm_evaluation import cli, comparison, gate, intervals
from bksdm_evaluation.artists import BundleArtist, Settings
from bksdm_evaluation.captions import Caption, Captions
from bksdm_evaluation.checkpoint_artist import CheckpointArtist
from bksdm_evaluation.feature_set import Accumulator, FeatureSet, FeatureSetError
from bksdm_evaluation.generation import Job, generate
from bksdm_evaluation.picture_sets import generated
from bksdm_evaluation.protocol import CLEAN
from bksdm_evaluation.scores import Networks
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline

THINGS = "apple,hot dog,crab,shamrock,owl,cherries,cactus,pizza,fox,tulip,penguin,carrot,snail,frog,croissant,whale"
CAPTIONS = Captions(
    tuple(Caption(f"{i:02d}", f"a {thing}, 3d icon") for i, thing in enumerate(THINGS.split(","))), "c.txt", "ab" * 32
)
EXPORT = "from bksdm_export.cli import main; main()"
JOB = Job(CAPTIONS, Settings(steps=10, guidance_scale=2.0, batch_size=16), CLEAN, seed=0, size=128)


class Mean(torch.nn.Module):
    """Stands for LPIPS, whose weights come from a package: near its values here."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "pictures"
    generate(CheckpointArtist(checkpoint.load("demo")), JOB, folder)
    return folder


def verdict(exact: Path, folder: Path) -> dict[str, bool | None]:
    """The answer to each question."""
    a, b = (generated([one], None, 128) for one in (exact, folder))
    nothing = Networks((), None, None, None)
    compared = comparison.compare(a, b, Mean(), nothing, {})
    drifts = gate.drifts(compared.pairs)
    return {one.what: one.passed for one in gate.judge(compared.pairs, drifts, {}, gate.Bounds())}


@pytest.fixture
def judged(exact: Path, tmp_path: Path) -> Callable[[Checkpoint], dict[str, bool | None]]:
    def judged(model: Checkpoint) -> dict[str, bool | None]:
        generate(CheckpointArtist(model), JOB, tmp_path / "pictures")
        return verdict(exact, tmp_path / "pictures")

    return judged


def by_bundle(bundle: Bundle | Path, exact: Path, folder: Path) -> dict[str, bool | None]:
    generate(BundleArtist(Pipeline.open(bundle, EngineSettings(backend="onnxruntime", threads=1))), JOB, folder)
    return verdict(exact, folder)


def test_an_exported_bundle_passes(exact: Path, tmp_path: Path) -> None:
    answers = by_bundle(bundles.demo(), exact, tmp_path / "pictures")
    assert set(answers.values()) == {True}, answers


@pytest.mark.slow
def test_a_true_fp16_bundle_passes(exact: Path, tmp_path: Path) -> None:
    """In its own arithmetic, which ONNX Runtime has on a CPU too."""
    command = ["--weights", "demo", "--precision", "fp16", "-o", str(tmp_path / "fp16")]
    assert subprocess.run([sys.executable, "-c", EXPORT, *command], check=False).returncode == 0
    answers = by_bundle(tmp_path / "fp16", exact, tmp_path / "pictures")
    assert set(answers.values()) == {True}, answers


def offset(model: Checkpoint) -> Checkpoint:
    return replace(model, scheduler_config={**model.scheduler_config, "steps_offset": 0})


def scale(model: Checkpoint) -> Checkpoint:
    model.vae.register_to_config(scaling_factor=model.vae.config["scaling_factor"] * 1.05)
    return model


def swapped(model: Checkpoint) -> Checkpoint:
    forward = model.unet.forward

    def turned(*args: object, **kwargs: object) -> tuple[torch.Tensor]:
        first, second = forward(*args, **kwargs)[0].chunk(2)
        return (torch.cat([second, first]),)

    model.unet.forward = turned
    return model


def coarse(model: Checkpoint) -> Checkpoint:
    """Weights of one scale a tensor, in 4 bits: an int8 of outliers."""
    for name, weight in model.unet.named_parameters():
        if weight.ndim > 1 and "time" not in name:
            step = weight.abs().max() / 7
            weight.data = (weight / step).round() * step
    return model


def overflowing(model: Checkpoint) -> Checkpoint:
    """A residual that fp32 holds and fp16 does not, saturated where it overflows: the island is missing."""
    convolution = model.unet.up_blocks[-1].resnets[-1].conv1

    def clipped(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        return (output * 2e5).clamp(-65504, 65504) / 2e5

    convolution.register_forward_hook(clipped)
    return model


FAULTS = {  # and what is sure to catch each
    "timesteps off by one": (offset, "drift of brightness"),  # of 25 steps it is the sharpness
    "a wrong VAE scale": (scale, "drift of contrast"),
    "guidance halves swapped": (swapped, "PSNR"),
    "an int8 that is too coarse": (coarse, "PSNR"),
    "an overflow island removed": (overflowing, "PSNR"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(judged: Callable[[Checkpoint], dict[str, bool | None]], name: str) -> None:
    plant, by = FAULTS[name]
    with torch.no_grad():
        answers = judged(plant(checkpoint.load("demo")))
    assert answers[by] is False, answers


def test_sets_that_differ_in_more_than_the_model_are_refused(exact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in exact.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    said = json.loads((other / "generation.json").read_text())
    (other / "generation.json").write_text(json.dumps({**said, "steps": 9, "model": {"kind": "x"}}))
    with pytest.raises(Exception, match="differ in more than what drew them: steps is 10 there, 9 here"):
        verdict(exact, other)
    (other / "generation.json").write_text(json.dumps({**said, "model": {"kind": "x"}}))
    assert set(verdict(exact, other).values()) == {True}
    (other / "03.png").unlink()
    with pytest.raises(Exception, match="1 picture of the first set without a picture: 03"):
        verdict(exact, other)


def test_a_reference_that_was_prepared_otherwise_is_refused() -> None:
    random = np.random.default_rng(0)

    def of(protocol: str) -> FeatureSet:
        taken = Accumulator(4)
        taken.add([str(i) for i in range(9)], random.normal(size=(9, 4)))
        return taken.result({"protocol": protocol})

    pairs = gate.Pairs([], np.empty(0), np.empty(0), {})
    compared = comparison.Compared(pairs, (of("clean"), of("clean")), None)
    assert "kid" in comparison.differences_of_scores(compared, of("clean"))
    with pytest.raises(
        FeatureSetError,
        match=r"the reference was prepared otherwise \(protocol is published there, clean here",
    ):
        comparison.differences_of_scores(compared, of("published"))


@pytest.mark.parametrize(("count", "passed"), [(10_079, None), (10_080, True)])
def test_few_pictures_say_nothing_of_the_inception_score(count: int, passed: bool | None) -> None:
    pairs = gate.Pairs(["a"] * count, np.full(count, 50.0), np.zeros(count), {})
    scores = (np.full(10, 1.0), np.full(10, 1.01))
    found = comparison.differences_of_scores(comparison.Compared(pairs, None, None, scores), None)
    assert found["inception score"].value == pytest.approx(0.01)
    *_, asked = gate.judge(pairs, {}, found, gate.Bounds())
    assert (asked.what, asked.passed) == ("difference of inception score", passed)


def test_a_score_that_is_no_number_fails() -> None:
    pairs = gate.Pairs(["a"], np.array([50.0]), np.zeros(1), {})
    nan = intervals.Interval(float("nan"), float("nan"), float("nan"), "")
    *_, asked = gate.judge(pairs, {}, {"fid": nan}, gate.Bounds())
    assert asked.passed is False


def test_psnr_and_looks_are_their_formulas() -> None:
    random = np.random.default_rng(0)
    a = random.integers(0, 250, (9, 8, 3)).astype(np.uint8)
    assert gate.psnr(a, a) == 99
    assert gate.psnr(a, a + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    grey = a.astype(float).mean(2)
    found = gate.looks(a)
    laplacian = [
        grey[i - 1, j] + grey[i + 1, j] + grey[i, j - 1] + grey[i, j + 1] - 4 * grey[i, j]
        for i in range(1, 8)
        for j in range(1, 7)
    ]
    assert found["sharpness"] == pytest.approx(np.sqrt(np.mean(np.square(laplacian))))
    assert found["brightness"] == pytest.approx(grey.mean())
    assert found["saturation"] == pytest.approx((a.max(2).astype(int) - a.min(2)).mean())
    flat = gate.looks(np.full((9, 8, 3), 7, np.uint8))
    assert (flat["contrast"], flat["sharpness"], flat["saturation"]) == (0, 0, 0)


def test_the_command_says_what_failed_and_exits_1(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bksdm.perceptual.Lpips", Mean)
    darker = tmp_path / "darker"
    darker.mkdir()
    for path in exact.iterdir():
        if path.suffix == ".png":
            Image.fromarray((np.asarray(Image.open(path)) * 0.98).astype(np.uint8)).save(darker / path.name)
    (darker / "metadata.jsonl").write_bytes((exact / "metadata.jsonl").read_bytes())

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bksdm-eval", "compare", str(exact), *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, err = run(darker, "--size", 128, "-o", tmp_path / "gate.json")
    assert code == 1
    assert "drift of brightness" in out
    assert "clean protocol, 128 px, 16 pairs: FAILED" in out
    assert err.splitlines()[-1].startswith(f"bksdm-eval: {darker} does not pass beside {exact}: drift of brightness")
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["passed"] is False
    assert len(found["worst"]) == 8
    assert run(darker, "--size", 128, "--max-drift", "0.05")[0] == 0
    assert run(exact, "--size", 128)[0] == 0
