"""`bksdm-export` as a person meets it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bksdm_export import cli, recipe
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
        (["--variant", "tiny", "--precision", "fp16", "--storage", "fp32", "-o", "out"], 1, "is not written"),
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


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "export_variant", interrupted)
    assert cli.run(["--variant", "tiny", "-o", str(tmp_path / "bundle")]) == 130
    assert capsys.readouterr().err.endswith("bksdm-export: interrupted\n")


@pytest.mark.parametrize(
    ("variant", "weights", "precision", "expected"),
    [
        ("small", None, "fp32", "out/bk-sdm-small"),
        ("sd-v1.4", None, "fp32", "out/stable-diffusion-v1-4"),
        ("tiny", "random", "fp16", "out/bk-sdm-tiny-random-fp16"),
        (None, "runs/my-student/", "fp32", "out/my-student"),
        (None, "downloads/v1-5.safetensors", "fp32", "out/v1-5"),
        (None, "demo", "fp32", "out/demo"),
    ],
)
def test_the_default_output_is_the_models_name(
    variant: str | None, weights: str | None, precision: str, expected: str
) -> None:
    assert cli.default_output(variant, weights, precision) == Path(expected)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bksdm-export ")


def test_every_package_of_the_extra_is_asked_for() -> None:
    assert all(importlib.util.find_spec(name) for name in cli._EXTRA)
    assert set(HEAVY) <= set(cli._EXTRA)
