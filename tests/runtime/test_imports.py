"""The runtime stays light and torch-free, proven in fresh interpreters."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bksdm_runtime

FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "safetensors", "accelerate", "huggingface_hub")
PACKAGE = Path(bksdm_runtime.__file__).parent


def run_python(script: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_running_a_prompt_imports_no_torch_and_one_backend(toy_bundle: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend, reason="needs the extra of the backend")
    script = f"""
import sys
from bksdm_runtime.cli import run
arguments = ["a red apple", "--bundle", {str(toy_bundle)!r}, "--steps", "2", "--threads", "1", "-o", "x.png"]
assert run([*arguments, "--backend", {backend!r}]) == 0
found = {{name.split(".")[0] for name in sys.modules}}
print(sorted(found & {{"onnxruntime", "openvino"}}), sorted(found & set({FORBIDDEN!r})))
"""
    assert run_python(script, tmp_path) == f"x.png\n['{backend}'] []\n"


def test_importing_the_package_imports_nothing(tmp_path: Path) -> None:
    script = "import sys; before = set(sys.modules); import bksdm_runtime; print(sorted(set(sys.modules) - before))"
    assert run_python(script, tmp_path) == "['bksdm_runtime']\n"


def test_the_command_line_imports_only_click_and_numpy(tmp_path: Path) -> None:
    heavy = ("PIL", "tokenizers", "tqdm", "onnxruntime", "openvino")
    script = f"import sys, bksdm_runtime.cli; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(script, tmp_path) == "[]\n"


def test_no_file_mentions_a_forbidden_import() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(FORBIDDEN), path
