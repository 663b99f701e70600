"""Environments and models of the CPU benchmark: made once under a folder, used again while their rows are the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from cpu_rows import CHECKPOINT, CURRENT, ENVIRONMENTS, MODELS

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
SOURCES = [str(REPOSITORY / folder) for folder in (".", "export", "runtime")]
_STAMP = "made.json"  # written last: what has none is not whole


class MakeError(Exception):
    """An environment or a model cannot be made; the message says what failed and why."""


@dataclass(frozen=True)
class Workshop:
    """Where things are made. fixed: models that are there already, by name (the short form's)."""

    folder: Path
    variant: str
    fixed: Mapping[str, Path]

    def python(self, environment: str) -> str:
        """Its interpreter, the environment made if need be. Raises MakeError."""
        if environment == CURRENT:
            return sys.executable
        row = ENVIRONMENTS[environment]
        folder = self.folder / "environments" / environment
        stamp = {**asdict(row), "python": sys.version}
        if not _is_made(folder, stamp):
            _clear(folder)
            log = folder.with_name(f"{environment}.log")
            run([sys.executable, "-m", "venv", str(folder)], f"environment {environment}", log)
            pip = [str(folder / "bin" / "python"), "-m", "pip"]
            for packages in row.packages:
                run([*pip, "install", *packages], f"environment {environment}", log, row.variables)
            if row.removed:
                run([*pip, "uninstall", "-y", *row.removed], f"environment {environment}", log)
            _mark(folder, stamp)
        return str(folder / "bin" / "python")

    def model(self, name: str) -> Path:
        """Where a model is, made if need be, and what it is made from. Raises MakeError."""
        if name in self.fixed:
            return self.fixed[name]
        row = MODELS[name]
        output = self.folder / "models" / self.variant / name
        source = "" if name == CHECKPOINT else str(self.model(CHECKPOINT))
        needed = {need: str(self.model(need)) for need in row.needs}
        stamp = {
            "command": row.command,
            "sources": source_digest() if row.environment == CURRENT else "",
            "needs": [_stamp_of(Path(folder)).read_text() for folder in needed.values()],
        }
        if not _is_made(output, stamp):
            _clear(output)
            python = self.python(row.environment)
            places = {
                "python": python,
                "bin": str(Path(python).parent),
                "script": str(HERE),
                "variant": self.variant,
                "checkpoint": source,
                "output": str(output),
                **needed,
            }
            command = [_filled(word, places) for word in row.command]
            variables = source_variables() if row.environment == CURRENT else {}
            run(command, f"model {name} of {self.variant}", output.with_name(f"{name}.log"), variables)
            _mark(output, stamp)
        return output


@cache
def source_digest() -> str:
    """Of what makes models of ours: where it changes, they are made again."""
    digest = hashlib.sha256()
    for folder in ("bksdm", "export/bksdm_export"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def source_variables() -> dict[str, str]:
    """What lets a process of the current environment import this repository."""
    return {"PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}


def run(command: Sequence[str], what: str, log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run to the end, its output into `log`. Raises MakeError with the last line of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {what} ({log})", file=sys.stderr, flush=True)
    with log.open("ab") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, env={**os.environ, **(variables or {})}, check=False
            ).returncode
        except OSError as error:
            raise MakeError(f"{what} cannot be made: {command[0]}: {error.strerror}") from error
    if code:
        raise MakeError(f"{what} cannot be made: {why(code, log)} ({log})")


def why(code: int, log: Path) -> str:
    """One line about a process that failed: its last words, or that it was killed."""
    if code == -9:
        return "killed (too little memory?)"
    if code < 0:
        return f"ended by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and not line.startswith("[notice]")]
    return said[-1][:300] if said else f"exit code {code}"


def _filled(word: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _stamp_of(made: Path) -> Path:
    return made / _STAMP if made.is_dir() else made.with_name(f"{made.name}.{_STAMP}")


def _is_made(made: Path, stamp: Mapping[str, object]) -> bool:
    path = _stamp_of(made)
    return made.exists() and path.is_file() and json.loads(path.read_text()) == json.loads(json.dumps(stamp))


def _mark(made: Path, stamp: Mapping[str, object]) -> None:
    if not made.exists():
        raise MakeError(f"{made} was not written, though what makes it reported no error")
    _stamp_of(made).write_text(json.dumps(stamp), encoding="utf-8")


def _clear(made: Path) -> None:
    _stamp_of(made).unlink(missing_ok=True)
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink(missing_ok=True)
    made.parent.mkdir(parents=True, exist_ok=True)
