"""Seconds and peak memory of `bksdm-export --weights random`, one fresh process for each variant.

    python benchmarks/export.py --variants tiny sd-v1.4 --precision fp32 --json figures.json

The peak is the process's largest resident set, everything in it counted: the interpreter, PyTorch's and ONNX Runtime's
code, mapped files. The bound is 2.2 times the weights in float32. Exit 1 where an export failed or is over it.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [str(REPOSITORY / folder) for folder in (".", "export", "runtime")]
COMMAND = [sys.executable, "-c", "from bksdm_export.cli import main; main()"]
MEMORY_BOUND = 2.2  # times the weights in float32
# Asked for by the names of distributions: an import would be memory that Linux counts to every process started here.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")


@dataclass(frozen=True)
class Row:
    """One export. graph_seconds: of PyTorch to ONNX alone; weights: in float32; ratio: peak to weights."""

    variant: str
    seconds: float
    exit_code: int
    graph_seconds: float | None = None
    bundle_bytes: int | None = None
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    ratio: float | None = None

    @property
    def passed(self) -> bool:
        return self.ratio is not None and self.ratio < MEMORY_BOUND

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.variant:12} failed with exit code {self.exit_code}"
        bundle, peak, weights = ((size or 0) / 1e6 for size in (self.bundle_bytes, self.peak_bytes, self.weights_bytes))
        mark = "" if self.passed else f"  over {MEMORY_BOUND}"
        return (
            f"{self.variant:12} {self.seconds:6.0f} {self.graph_seconds or 0:13.0f} {bundle:10,.0f} {peak:9,.0f} "
            f"{weights:11,.0f} {self.ratio:6.2f}{mark}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "base", "sd-v1.4"])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--storage", choices=("fp32", "fp16"))
    parser.add_argument("--verify", default="quick", choices=("quick", "full"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    chosen = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    versions = {"torch": metadata.version("torch"), "onnxruntime": _onnxruntime(), "python": platform.python_version()}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{platform.machine()}, {cores} usable cores, torch threads: {threads}, verify {chosen.verify}, {made_with}")
    print(
        f"{'variant':12} {'s':>6} {'of it graphs':>13} {'bundle MB':>10} {'peak MB':>9} {'weights MB':>11} {'ratio':>6}"
    )
    rows: list[Row] = []
    for variant in chosen.variants:
        rows.append(measure(variant, chosen.precision, chosen.storage, chosen.verify))
        print(rows[-1], flush=True)
    if chosen.json is not None:
        figures = {
            "machine": platform.machine(),
            "cores": cores,
            "threads": threads,
            "versions": versions,
            "precision": chosen.precision,
            "storage": chosen.storage or chosen.precision,
            "verify": chosen.verify,
            "bound": MEMORY_BOUND,
            "rows": [asdict(row) for row in rows],
        }
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.passed for row in rows) else 1


def measure(variant: str, precision: str, storage: str | None, verify: str) -> Row:
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
            return Row(variant, seconds, process.returncode)
        manifest = json.loads((output / "bundle.json").read_text())
        graphs = json.loads((output / "parity.json").read_text())["components"].values()
    weights = sum(graph["bytes"] for graph in graphs) * (2 if "fp16" in (precision, manifest["storage"]) else 1)
    peak = usage.ru_maxrss * 1024  # Linux counts in KiB
    return Row(
        variant,
        seconds,
        exit_code=0,
        graph_seconds=sum(graph["seconds"] for graph in graphs),
        bundle_bytes=sum(record["bytes"] for record in manifest["files"].values()),
        peak_bytes=peak,
        weights_bytes=weights,
        ratio=peak / weights,
    )


def _onnxruntime() -> str:
    for name in ONNXRUNTIMES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
