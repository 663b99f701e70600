"""Seconds and peak memory of `bksdm-export --weights random`, one fresh process for each variant.

    python benchmarks/export.py --variants tiny sd-v1.4 --precision fp32

The peak is the process's largest resident set, everything in it counted: the interpreter, PyTorch's and ONNX Runtime's
code, mapped files. The bound is 2.2 times the weights in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [str(REPOSITORY / folder) for folder in (".", "export", "runtime")]
COMMAND = [sys.executable, "-c", "from bksdm_export.cli import main; main()"]
MEMORY_BOUND = 2.2  # times the weights in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "base", "sd-v1.4"])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--storage", choices=("fp32", "fp16"))
    parser.add_argument("--verify", default="quick", choices=("quick", "full"))
    arguments = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch threads: {threads}, verify {arguments.verify}")
    print(
        f"{'variant':12} {'s':>6} {'of it graphs':>13} {'bundle MB':>10} {'peak MB':>9} {'weights MB':>11} {'ratio':>6}"
    )
    for variant in arguments.variants:
        print(row(variant, arguments.precision, arguments.storage, arguments.verify), flush=True)


def row(variant: str, precision: str, storage: str | None, verify: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / variant
        options = ["--variant", variant, "--weights", "random", "--precision", precision, "--verify", verify]
        if storage:
            options += ["--storage", storage]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
        started = time.perf_counter()
        process = subprocess.Popen([*COMMAND, *options, "-o", str(output)], env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            return f"{variant:12} failed with exit code {process.returncode}"
        manifest = json.loads((output / "bundle.json").read_text())
        graphs = json.loads((output / "parity.json").read_text())["components"].values()
        weights = sum(graph["bytes"] for graph in graphs) * (2 if "fp16" in (precision, manifest["storage"]) else 1)
        bundle = sum(record["bytes"] for record in manifest["files"].values())
        export = sum(graph["seconds"] for graph in graphs)
    peak = usage.ru_maxrss * 1024  # Linux counts in KiB
    mark = "" if peak < MEMORY_BOUND * weights else f"  over {MEMORY_BOUND}"
    return (
        f"{variant:12} {seconds:6.0f} {export:13.0f} {bundle / 1e6:10,.0f} {peak / 1e6:9,.0f} {weights / 1e6:11,.0f} "
        f"{peak / weights:6.2f}{mark}"
    )


if __name__ == "__main__":
    main()
