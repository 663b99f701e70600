"""The process that builds one engine: started, listened to, and what it ended with in one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm_export.errors import ExportError
from bksdm_export.plan_builder import Job

log = logging.getLogger(__name__)

BUILDER = (sys.executable, "-m", "bksdm_export.plan_builder")  # takes the path of a job


@dataclass(frozen=True)
class Progress:
    """Where a build is. component: of which graph; phase: as TensorRT names it; step of steps, where it says."""

    component: str
    phase: str
    step: int = 0
    steps: int = 0


def build_apart(job: Job, name: str, folder: Path, progress: Callable[[Progress], None]) -> int:
    """Build in a process of its own, and return its peak memory in bytes. Raises ExportError when it fails."""
    (folder / "job.json").write_text(job.to_json(), encoding="utf-8")
    sources = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        _Builder([*BUILDER, str(folder / "job.json")], said, sources) as builder,
    ):
        phase, peak = "starting", 0
        for told in builder.told():
            if "phase" in told:
                phase = str(told["phase"])
                progress(Progress(name, phase, int(told["step"]), int(told["steps"])))
            peak = int(told.get("peak_bytes", peak))
        code = builder.end()
        said.seek(0)
        words = said.read()
    if words.strip():
        log.info("%s: %s", name, words.strip())
    if code:
        raise ExportError(f"{name} is not built ({phase}): {_why(code, words)}")
    if not Path(job.plan).is_file():
        raise ExportError(f"{name} is not built ({phase}): the builder wrote no plan")
    return peak


class _Builder:
    """The builder's process. It ends with this block, and with this process: it listens to a pipe that we hold."""

    def __init__(self, command: list[str], said: object, sources: str) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,  # type: ignore[arg-type]
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": sources},
        )

    def __enter__(self) -> _Builder:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def told(self) -> Iterator[Mapping[str, Any]]:
        """What it says on stdout, until it ends; what is no line of ours goes to the log."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                log.debug("%s", line.rstrip())
                continue
            if isinstance(told, dict):
                yield told

    def end(self) -> int:
        """Wait for its exit code; negative: of a signal."""
        return self._process.wait()


def _why(code: int, words: str) -> str:
    """One line about a builder that failed: its last error, or how it ended."""
    if code == -signal.SIGKILL:
        return "the builder was killed (out of memory?): close other programs, or build fewer shapes"
    if code < 0:
        return f"TensorRT crashed ({signal.Signals(-code).name}): {_last(words) or 'it said nothing'}"
    return _last(words) or f"the builder ended with exit code {code}"


def _last(words: str) -> str:
    """The error that says most: TensorRT's own before Polygraphy's that an engine is invalid."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line.removeprefix("[E]").strip() for line in lines if line.startswith("[E]")]
    if errors:
        return errors[0][:400]
    return lines[-1].removeprefix("[!]").strip()[:400] if lines else ""
