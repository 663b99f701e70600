"""Stable Diffusion on a CPU: this runtime against every peer, in one interleaved run.

    python benchmarks/cpu.py --variants tiny small base sd-v1.4 --cache ~/.cache/bksdm-benchmark --write
    python benchmarks/cpu.py --variants tiny --contenders ours GenAI --rounds 5 --json figures.json
    python benchmarks/cpu.py --quick

Random weights at true architecture, guidance on, batch 1, the same prompt, seed and noise; every contender opens the
same weights in its own format, in an environment of its own with pinned packages (cpu_rows.py), made on first use.

A round is a fresh process of each contender in turn, one at a time: no contender waits in memory or spins on a core
while another is measured. A process draws its first picture (the cold start: from the process's start), then
--pictures more (the warm figures). Ratios are within a round, the spread is over rounds. Peak memory is the process's
largest resident set. Euler's method: every peer has it (stable-diffusion.cpp has no PNDM), and N
steps are N evaluations everywhere. A contender that cannot be made or fails is a row with its reason.

Writes all samples as JSON, after every process; --resume goes on from them where a run was cut off, or asked for fewer
rounds or contenders. With --write also docs/cpu-benchmark.md's tables and charts. Exit 1 where one of ours failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cpu_figures
import cpu_page
from cpu_make import HERE, REPOSITORY, SOURCES, MakeError, Workshop, source_variables, why
from cpu_rows import CHECKPOINT, CURRENT, QUICK, ROWS, Row

sys.path[:0] = SOURCES
from bksdm_runtime.engine import BACKENDS  # noqa: E402
from bksdm_runtime.noise import open_generator  # noqa: E402

PROMPT, SEED, GUIDANCE = "a photo of a red house by the sea", 0, 7.5
PAGE = REPOSITORY / "docs" / "cpu-benchmark.md"
DEMO_SIZE = 64
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of /proc/cpuinfo, the last one ARM's


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _arguments(arguments)
    machine = _machine(chosen.threads)
    print(f"{machine['cpu']}, {machine['cores']} usable cores, {chosen.threads} threads, bf16: {machine['bf16']}")
    task = {key: getattr(chosen, key) for key in ("variants", "size", "steps", "rounds", "pictures", "threads")}
    try:
        begun = _begun(chosen.json, machine, task) if chosen.resume else {"peaks": [], "variants": {}}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    peaks = [*begun["peaks"], _machine_figures("peak", str(chosen.threads))]
    written: dict[str, Any] = {"machine": machine, "task": task, "peaks": peaks, "variants": begun["variants"]}
    for number, variant in enumerate(chosen.variants):
        shop = Workshop(chosen.cache, variant, _demo_models() if chosen.quick else {})
        rows = [row for row in chosen.rows if number == 0 or row.name in chosen.scaling]
        batches = tuple(chosen.batches) if number == 0 else ()
        try:
            _variant(chosen, shop, rows, written, batches)
        except MakeError as error:  # the checkpoint, of which all else is made
            print(error, file=sys.stderr)
            return 1
    if not chosen.quick:
        written["peaks"].append(_machine_figures("peak", str(chosen.threads)))  # the faster of both counts
    written["figures"] = cpu_figures.summarise(written)
    print(cpu_page.tables(written))
    _save(chosen.json, written)
    print(f"all samples: {chosen.json}")
    if chosen.write:
        cpu_page.write(chosen.write, written)
        print(f"written: {chosen.write}")
    every = [result for part in written["variants"].values() for result in part["contenders"]]
    ours = [result for result in every if result["kind"] == "ours"]
    return 1 if any(result["failed"] for result in ours) or not any(result["samples"] for result in ours) else 0


def _begun(path: Path, machine: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run wrote, to go on from. Raises ValueError where there is none or it measured something else."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume: {path} cannot be read: {error}") from error
    if not all(isinstance(begun, dict) and isinstance(begun.get(key), dict) for key in ("machine", "task", "variants")):
        raise ValueError(f"--resume: {path} is no report of this benchmark; leave out --resume")
    for name, now, free in (("machine", machine, ()), ("task", task, ("variants", "rounds"))):
        others = [key for key in now if key not in free and begun[name].get(key) != now[key]]
        if others:
            raise ValueError(f"--resume: {path} is of another {name}: {', '.join(others)} differ; leave out --resume")
    return begun


def _save(path: Path, written: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}")
    half.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    half.replace(path)


def _variant(
    chosen: argparse.Namespace, shop: Workshop, rows: Sequence[Row], written: dict[str, Any], batches: tuple[int, ...]
) -> None:
    """All rounds of one variant, into `written`: contenders with their samples, or the reason why there are none."""
    before = written["variants"].get(shop.variant, {"contenders": []})["contenders"]
    results = [_result(row, _unfit(row, written["machine"], chosen.asked), before) for row in rows]
    for row, result in zip(rows, results, strict=True):
        if result["skipped"] is None:
            try:
                shop.python(CURRENT if chosen.quick else row.environment)
                shop.model(row.model)
            except MakeError as error:
                _fail(result, str(error))
    work = _machine_figures("work", str(shop.model(CHECKPOINT)), str(chosen.size))
    chosen_now = {row.name for row in rows}
    kept = [earlier for earlier in before if earlier["name"] not in chosen_now]  # measured before, not asked for now
    written["variants"][shop.variant] = {"work": work, "contenders": _in_order([*results, *kept])}
    for number in range(1, chosen.rounds + 1):
        for row, result in zip(rows, results, strict=True):
            wanted = batches if number == chosen.rounds else ()
            missing = len(result["samples"]) < number
            if result["skipped"] or result["failed"] or not (missing or (wanted and not result["batches"])):
                continue
            sample = _measure(chosen, shop, row, result, wanted)
            if sample is not None and missing:
                result["samples"].append(sample)
                print(f"{number:2} {shop.variant:8} {row.name:34} {cpu_figures.line(sample)}", flush=True)
            _save(chosen.json, written)


def _in_order(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the table of contenders has them; what it no longer has comes last."""
    places = {row.name: place for place, row in enumerate(ROWS)}
    return sorted(results, key=lambda result: places.get(result["name"], len(places)))


def _result(row: Row, skipped: str | None, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a row, with the samples of an earlier run of the same row; what failed there is tried again."""
    own = json.loads(json.dumps(asdict(row)))
    kept = {"samples": [], "batches": None, "picture": None}
    for earlier in before:
        if {key: earlier.get(key) for key in own} == own:
            kept = {key: earlier[key] for key in kept}
    return {**own, "skipped": skipped, "failed": None, **kept}


def _unfit(row: Row, machine: dict[str, Any], asked: Sequence[str]) -> str | None:
    """Why a row is not even tried; None where it is."""
    if row.backend is not None and row.backend not in BACKENDS:
        return f"bksdm_runtime has no backend {row.backend!r}"
    if row.arithmetic == "bf16" and not machine["bf16"] and row.name not in asked:
        return "this CPU has no bf16 arithmetic; it would be emulated: name the row with --contenders to run it"
    return None


def _measure(
    chosen: argparse.Namespace, shop: Workshop, row: Row, result: dict[str, Any], batches: tuple[int, ...]
) -> dict[str, Any] | None:
    """One fresh process of a contender: its Result, or None with the reason in `result`."""
    python = shop.python(CURRENT if chosen.quick else row.environment)
    folder = chosen.cache / "runs" / shop.variant
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in row.name)
    answer, log = folder / f"{name}.json", folder / f"{name}.log"
    answer.unlink(missing_ok=True)
    task = {
        "kind": row.kind,
        "model": str(shop.model(row.model)),
        "options": dict(row.options),
        "prompt": PROMPT,
        "seed": SEED,
        "guidance": GUIDANCE,
        **{key: getattr(chosen, key) for key in ("steps", "size", "threads", "pictures")},
        "noise": str(_noise(folder, chosen.size)),
        "picture": str(folder / f"{name}.png"),
        "batches": batches,
    }
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(chosen.threads),
        "HF_HUB_OFFLINE": "1",
        **row.variables,
        **(source_variables() if row.kind == "ours" else {}),
    }
    with log.open("wb") as output:
        command = [python, str(HERE / "cpu_contender.py"), json.dumps({**task, "started": time.time()}), str(answer)]
        try:
            ended = subprocess.run(
                command, stdout=output, stderr=output, env=variables, timeout=chosen.limit, check=False
            )
        except subprocess.TimeoutExpired:
            return _fail(result, f"took more than {chosen.limit} s")
    if ended.returncode or not answer.is_file():
        return _fail(result, why(ended.returncode, log))
    sample = json.loads(answer.read_text())
    result["picture"] = task["picture"]
    result["batches"] = list(sample["drawn"][chosen.pictures :]) or result["batches"]
    return {**sample, "drawn": sample["drawn"][: chosen.pictures]}


def _fail(result: dict[str, Any], reason: str) -> None:
    result["failed"] = reason
    print(f"{result['name']}: {reason}", file=sys.stderr, flush=True)


def _noise(folder: Path, size: int) -> Path:
    """A file of what torch's CPU generator draws first for SEED, in float32: [1, 4, size / 8, size / 8]."""
    path = folder / f"noise-{size}.f32"
    if not path.is_file():
        path.write_bytes(open_generator(SEED, "cpu").randn((4, size // 8, size // 8)).tobytes())
    return path


def _machine_figures(*arguments: str) -> dict[str, float]:
    """What cpu_machine.py prints. A process of its own: PyTorch's memory and threads stay out of this one."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "cpu_machine.py"), *arguments],
        env={**os.environ, **source_variables()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def _machine(threads: int) -> dict[str, Any]:
    described = Path("/proc/cpuinfo").read_text()
    facts = dict(line.split(":", 1) for line in described.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "flags": sorted(flag for flag in flags if flag.startswith(("avx", "amx", "sve", "bf16"))),
        "bf16": bool(flags & _BF16),
        "python": platform.python_version(),
    }


def _demo_models() -> dict[str, Path]:
    """The short form's models, which are in the repository. Optimum opens the bundle itself."""
    bundle = REPOSITORY / "runtime" / "bksdm_runtime" / "demo"
    return {CHECKPOINT: REPOSITORY / "checkpoints" / "demo", "bundle": bundle, "onnx": bundle}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["tiny"], help="the first with all contenders")
    parser.add_argument("--contenders", nargs="+", metavar="WORD", help="rows whose name has one of these words")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="leave out rows with one of these")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contender")
    parser.add_argument("--pictures", type=int, default=1, help="after a process's first")
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 4], help="throughput, in the last round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=int, default=3600, help="seconds that a process may take")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bksdm-benchmark", help="kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: figures.json in the cache")
    parser.add_argument("--resume", action="store_true", help="keep the samples that the JSON has, go on from there")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=PAGE, metavar="PAGE", help="tables and charts of docs/cpu-benchmark.md"
    )
    parser.add_argument("--quick", action="store_true", help="does it work: the demo, this environment, no judgement")
    chosen = parser.parse_args(arguments)
    if min(chosen.rounds, chosen.pictures, chosen.threads) < 1 or chosen.steps < 2:
        parser.error("--rounds, --pictures, --threads are at least 1, --steps 2: a step is timed after the first")
    if chosen.quick:
        chosen.variants, chosen.size, chosen.steps, chosen.rounds = ["demo"], DEMO_SIZE, 2, 1
    chosen.cache, chosen.json = chosen.cache.resolve(), chosen.json or chosen.cache / "figures.json"
    chosen.rows, chosen.asked = _rows(chosen, parser)
    # On the other variants: our rows and the plainest peer, to see what compression does to a time.
    chosen.scaling = {row.name for row in chosen.rows if row.kind == "ours" or row.name == "diffusers fp32"}
    return chosen


def _rows(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[Row], list[str]]:
    """The rows that are wanted, and the names of those that were asked for."""
    rows = [row for row in ROWS if row.name in QUICK] if chosen.quick else list(ROWS)
    asked: list[str] = []
    if chosen.contenders is not None:
        asked = [row.name for row in rows if any(word in row.name for word in chosen.contenders)]
        rows = [row for row in rows if row.name in asked]
    rows = [row for row in rows if not any(word in row.name for word in chosen.without)]
    if not rows:
        parser.error("no contender has such a name: " + "; ".join(row.name for row in ROWS))
    return rows, asked


if __name__ == "__main__":
    sys.exit(main())
