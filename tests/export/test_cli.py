"""`bksdm-export` as a person meets it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bksdm_export import cli, recipe
from bksdm_export.errors import ExportError
from bksdm_export.request import ExportRequest
from bksdm_runtime import bundle as bundles

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors")

# Stands in for an environment where nothing but the base dependencies is installed.
BARE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from bksdm_export.cli import main
main()
"""


def fresh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for what is said while modules are imported."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("export", "runtime", "."))
    command = [sys.executable, "-c", "from bksdm_export.cli import main; main()", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "DIFFUSERS_VERBOSITY"}
    variables = {**inherited, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("export", "runtime", "."))
    command = [sys.executable, "-c", BARE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)


def test_help_works_without_torch() -> None:
    result = bare("--help")
    assert result.returncode == 0, result.stderr
    for flag in ("--variant", "--weights", "--precision", "--storage", "--verify", "--force", "--output"):
        assert flag in result.stdout


def test_a_missing_extra_is_one_line() -> None:
    result = bare("--variant", "tiny")
    assert (result.returncode, result.stdout) == (2, "")
    # the first of them that is missed; everything is missing here
    assert re.fullmatch(r"bksdm-export: needs \w+: pip install 'bksdm\[export\]'", result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_an_export_prints_a_table_and_the_path(
    smallest_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "smallest"
    assert cli.run(["--weights", str(smallest_folder), "-o", str(output)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["component", "nodes", "MB", "error", "accepted", "export", "s"]
    assert lines[-1] == str(output)
    stages = [line.partition("] ")[2] for line in printed.err.splitlines()]
    assert stages[0] == "importing PyTorch"
    assert "unet: PyTorch to ONNX" in stages
    assert bundles.load(output).manifest.variant == "custom"

    assert cli.run(["--weights", str(smallest_folder), "-o", str(output)]) == 1
    assert "replace it with --force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--variant", "huge"], 2, "'huge' is not one of"),
        (["--precision", "int3"], 2, "'int3' is not one of"),
        (["--weights", "no/such/folder", "-o", "out"], 1, "bksdm-export: "),
        (["--weights", "no/such/folder"], 1, "there is no no/such/folder"),
        (["--variant", "tiny", "--precision", "fp16", "--storage", "fp32", "-o", "out"], 1, "is not written"),
        (["--weights", "no/such/folder", "--seed", "0"], 2, "--seed draws the weights of --weights random"),
        (["--variant", "tiny", "--seed", "1"], 2, "--seed draws the weights of --weights random"),
        (["--weights", "demo", "--revision", "main"], 2, "--revision names a commit on the Hub"),
        (
            ["--lora", "a", "--lora", "b", "--lora-scale", "1"],
            2,
            "2 --lora and 1 --lora-scale: give every file its scale",
        ),
        (["--lora-scale", "1"], 2, "0 --lora and 1 --lora-scale"),
        (["--weights", "no/such/folder", "-o", "."], 1, "is the folder you are in"),
    ],
)
def test_misuse_is_2_failure_is_1_and_both_are_one_sentence(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("faulty_decoder")
def test_a_wrong_graph_is_1_and_one_sentence_that_names_the_node_and_keeps_nothing(
    smallest_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["--weights", str(smallest_folder), "-o", str(tmp_path / "bundle")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    [said] = [line for line in printed.err.splitlines() if not line.startswith("[")]
    assert said.startswith("bksdm-export: the graphs are not PyTorch's: vae_decoder differs by ")
    assert "in vae_decoder the error appears at node decoder.up_blocks.2.resnets.0.conv1/Conv" in said
    [page] = tmp_path.iterdir()
    assert page.name == "bundle.failed.html"
    assert "decoder.up_blocks.2.resnets.0.conv1/Conv" in page.read_text()


def test_of_several_optimums_nothing_is_said() -> None:
    """diffusers reports at its import which distribution it picked, where two of them hold optimum."""
    result = fresh("--weights", "no/such/folder")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if not line.startswith(("[", "bksdm-export: "))] == []


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "export_variant", interrupted)
    assert cli.run(["--variant", "tiny", "-o", str(tmp_path / "bundle")]) == 130
    assert capsys.readouterr().err.endswith("bksdm-export: interrupted\n")


@pytest.mark.parametrize(
    ("variant", "weights", "expected"),
    [
        ("small", None, "out/bk-sdm-small"),
        ("sd-v1.4", None, "out/stable-diffusion-v1-4"),
        ("tiny", "random", "out/bk-sdm-tiny-random"),
        (None, "runs/my-student/", "out/my-student"),
        (None, "downloads/v1-5.safetensors", "out/v1-5"),
        (None, "downloads/sd-v1-4.ckpt", "out/sd-v1-4"),
        (None, "downloads/v1.5", "out/v1.5"),
        (None, "demo", "out/demo"),
        (None, ".", "out/here"),
        (None, "..", "out/above"),
        (None, "below/../.", "out/here"),
        (None, "/", "out/model"),
    ],
)
def test_the_default_output_is_the_models_name(
    variant: str | None, weights: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert cli.default_output(variant, weights) == Path(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "fp16"}, "out/bk-sdm-tiny-fp16"),
        ({"precision": "fp16", "storage": "fp16"}, "out/bk-sdm-tiny-fp16"),
        ({"precision": "int8", "int8_like": Path("out/base-int8")}, "out/bk-sdm-tiny-int8-like-base-int8"),
        ({"storage": "fp32"}, "out/bk-sdm-tiny"),
        ({"storage": "fp16"}, "out/bk-sdm-tiny-stored-fp16"),
        ({"revision": "fp16"}, "out/bk-sdm-tiny@fp16"),
        ({"revision": "refs/pr/3"}, "out/bk-sdm-tiny@refs-pr-3"),
        ({"unet": "runs/student"}, "out/bk-sdm-tiny-unet-student"),
        ({"unet": "runs/student/unet/"}, "out/bk-sdm-tiny-unet-student"),
        ({"loras": [("runs/dog", 1.0)]}, "out/bk-sdm-tiny-lora-dog"),
        ({"loras": [("runs/dog/pytorch_lora_weights.safetensors", 0.5), ("ink.safetensors", -1.0)]},
         "out/bk-sdm-tiny-lora-dog@0.5-lora-ink@-1"),
        ({"unet": "runs/student/unet", "revision": "v2", "storage": "fp16"},
         "out/bk-sdm-tiny@v2-unet-student-stored-fp16"),
    ],
)  # fmt: skip
def test_what_makes_another_model_makes_another_default_output(options: dict[str, Any], expected: str) -> None:
    assert cli.default_output("tiny", None, **options) == Path(expected)


def test_a_seed_makes_another_default_output() -> None:
    assert cli.default_output("tiny", "random", seed=3) == Path("out/bk-sdm-tiny-random-seed3")


def test_a_link_in_the_hubs_cache_is_not_named_after_its_hash(tmp_path: Path) -> None:
    (tmp_path / "v1-5.safetensors").symlink_to("blobs/2f9a8b")
    assert cli.default_output(None, str(tmp_path / "v1-5.safetensors")) == Path("out/v1-5")


def test_every_option_reaches_the_request_and_the_default_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[ExportRequest] = []

    def refused(request: ExportRequest, _progress: object) -> None:
        asked.append(request)
        raise ExportError("not now")

    monkeypatch.setattr(recipe, "export_variant", refused)
    common = ["--storage", "fp16", "--unet", "runs/student", "--verify", "full"]
    loras = ["--lora", "a", "--lora-scale", "0.5", "--lora", "b", "--lora-scale", "2", "--lora-partial"]
    assert cli.run(["--variant", "tiny", "--lora", "a", "--lora", "b"]) == 1
    assert asked.pop().loras == (("a", 1.0), ("b", 1.0))
    assert cli.run(["--variant", "tiny", *loras]) == 1
    request = asked.pop()
    assert (request.loras, request.lora_partial) == ((("a", 0.5), ("b", 2.0)), True)
    assert request.output == Path("out/bk-sdm-tiny-lora-a@0.5-lora-b@2")
    assert cli.run(["--variant", "tiny", "--revision", "v2", *common, "--force", "--allow-pickle", "--step-cache"]) == 1
    assert cli.run(["--variant", "tiny", "--weights", "random", "--seed", "7", *common]) == 1
    assert capsys.readouterr().err.endswith("bksdm-export: not now\n")
    tiny = ExportRequest(
        Path("out/bk-sdm-tiny@v2-unet-student-stored-fp16-step-cache"),
        variant="tiny",
        unet="runs/student",
        revision="v2",
        allow_pickle=True,
        storage="fp16",
        depth="full",
        step_cache=True,
        force=True,
    )
    random = Path("out/bk-sdm-tiny-random-seed7-unet-student-stored-fp16")
    otherwise = {"revision": None, "allow_pickle": False, "step_cache": False, "force": False}
    drawn = replace(tiny, output=random, weights="random", seed=7, **otherwise)
    assert asked == [tiny, drawn]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bksdm-export ")


def test_every_package_of_the_extra_is_asked_for() -> None:
    assert all(importlib.util.find_spec(name) for name in cli._EXTRA)
    assert set(HEAVY) <= set(cli._EXTRA)
