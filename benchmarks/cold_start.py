"""From the start of a `bksdm-run` process to its first step: seconds by phase, one fresh process for each measurement.

    python benchmarks/cold_start.py --bundle out/bk-sdm-tiny --backends onnxruntime openvino --rounds 3 --threads 2

The contenders take turns. "ready" is all of it up to the first step, less one warm U-Net evaluation: the first one also
compiles. CPU seconds stand beside wall seconds: on a shared machine they are the ones to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# In their order; "open" has the hashes in it, "warm" is the second evaluation.
PHASES = ("imports", "load", "open", "text", "step", "warm")

CHILD = """
import json, resource, sys, time
start, arguments = float(sys.argv[1]), sys.argv[2:]
marks = []
def mark(phase):
    used = resource.getrusage(resource.RUSAGE_SELF)
    marks.append((phase, time.time() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024))
def marked(function, phase):
    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        mark(phase)
        return result
    return run
from bksdm_runtime import bundle, cli, pictures, pipeline
mark("imports")
bundle.load = marked(bundle.load, "load")
pipeline.Pipeline.open = marked(pipeline.Pipeline.open, "open")
pipeline.open_generator = marked(pipeline.open_generator, "text")  # drawn once the prompts are encoded
real = pipeline.sample
def sample(*args, **kwargs):
    for step in real(*args, **kwargs):
        mark("step" if marks[-1][0] == "text" else "warm")
        yield step
pipeline.sample = sample
code = cli.run(arguments)
print(json.dumps(marks if code == 0 else []))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="default: the demo")
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "openvino"], help="openvino+cache: its cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, help="pixels; default: the bundle's own")
    parser.add_argument("--json", type=Path, help="write every measurement")
    options = parser.parse_args(arguments)
    runs: dict[str, list[list[tuple[str, float, float, float]]]] = {backend: [] for backend in options.backends}
    with tempfile.TemporaryDirectory() as folder:
        for backend in options.backends:
            if backend.endswith("+cache"):
                measure(backend, options, folder)  # fills the cache
        for _ in range(options.rounds):
            for backend, measured in runs.items():
                measured.append(measure(backend, options, folder))
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")
    print(f"{'':16}" + "".join(f"{phase:>14}" for phase in (*PHASES, "ready")) + f"{'peak MB':>9}   CPU s / wall s")
    for backend, measured in runs.items():
        print(f"{backend:16}{row(measured)}")
    return 0


def measure(backend: str, options: argparse.Namespace, folder: str) -> list[tuple[str, float, float, float]]:
    """(phase, wall seconds, CPU seconds, peak MB) since the start of a fresh process."""
    name, _, cache = backend.partition("+")
    flags = ["a red apple", "--backend", name, "--threads", str(options.threads), "--steps", "2"]
    flags += ["--scheduler", "euler", "-o", f"{folder}/x.png"]
    if options.bundle:
        flags += ["--bundle", options.bundle]
    if options.size:
        flags += ["--height", str(options.size), "--width", str(options.size)]
    if cache:
        flags.append("--compiled-cache")
    environment = {**os.environ, "XDG_CACHE_HOME": folder}
    command = [sys.executable, "-c", CHILD, str(time.time()), *flags]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [tuple(mark) for mark in json.loads(done.stdout.splitlines()[-1])]


def row(measured: Sequence[Sequence[tuple[str, float, float, float]]]) -> str:
    """Medians of each phase's own seconds, of "ready", and of the peak at the first step."""
    spent: dict[str, list[tuple[float, float]]] = {phase: [] for phase in (*PHASES, "ready")}
    for marks in measured:
        first = {phase: marks_of for phase, *marks_of in reversed(marks)}  # the first mark of each phase
        before = [0.0, 0.0]
        for phase in PHASES:
            wall, cpu, _ = first[phase]
            spent[phase].append((cpu - before[1], wall - before[0]))
            before = [wall, cpu]
        step, warm = first["step"], spent["warm"][-1]
        spent["ready"].append((step[1] - warm[0], step[0] - warm[1]))
    cells = [
        "/".join(f"{statistics.median(pair[i] for pair in pairs):.2f}" for i in (0, 1)) for pairs in spent.values()
    ]
    peak = statistics.median(mark[3] for marks in measured for mark in marks if mark[0] == "step")
    return "".join(f"{cell:>14}" for cell in cells) + f"{peak:9.0f}"


if __name__ == "__main__":
    sys.exit(main())
