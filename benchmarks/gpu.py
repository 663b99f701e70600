"""Stable Diffusion on a GPU: this runtime's backends against diffusers, eager and compiled, in one run.

    python benchmarks/gpu.py --variants tiny sd-v1.4 --rounds 2 --json gpu-report.json
    python benchmarks/gpu.py --page gpu-report.json        writes docs/gpu.md's tables and chart from a report

Random weights at true architecture, fp16, guidance on, PNDM, the same prompt, seeds and noise. A round is a fresh
process of each contender, another first each time; in it whole pictures, then the stages alone, each after a warm-up.
Medians and 95th percentiles (the slowest, of 20 or fewer) are over all rounds, ratios within a round. FLOP/s of the
U-Net count attention's products; its share is of the fastest fp16 matrix product of the same card in the same run.
Larger batches are drawn by ours and eager diffusers, of the first variant, in the first round, three pictures each. A
contender's picture is held against eager diffusers'. Exit 1 where one of ours failed or drew another picture, or an aim
is missed. TensorRT and TensorRT-RTX take part in every variant where they are installed and build for this GPU; their
engines are built before, of one fixed shape for each batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cpu_figures import decibels
from cpu_make import HERE, REPOSITORY, SOURCES, MakeError, run, source_digest

from bksdm_export import tensorrt_versions
from bksdm_export.errors import ExportError
from bksdm_runtime.bundle import ENGINES_FOLDER

PROMPT, SEED, GUIDANCE = "a red apple on a white table, studio photograph", 7, 7.5
OURS, EAGER, COMPILED = "ours, CUDA provider", "diffusers, eager", "diffusers, compiled"
# kind, options. Models are "bundle" and "checkpoint" of gpu_make.py.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("ours", {}),
    "ours, without CUDA graphs": ("ours", {"graphs": False}),
    "ours, graphs as ONNX writes them": ("ours", {"fused": False}),
    "ours, TensorRT": ("ours", {"backend": "tensorrt"}),
    "ours, TensorRT-RTX": ("ours", {"backend": "tensorrt-rtx"}),
    EAGER: ("diffusers", {}),
    COMPILED: ("diffusers", {"compiled": True}),
}
MODELS = {"ours": "bundle", "diffusers": "checkpoint"}
ELSEWHERE = (OURS, EAGER)  # of variants after the first, unless --contenders names others
SAME_PICTURE = 30.0  # dB
AIMS = {"ratio": 1.5, "share": 0.35}  # of the first variant: a whole picture to COMPILED's; the U-Net to the peak


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _arguments(arguments)
    if chosen.page is not None:
        import gpu_page

        gpu_page.write(REPOSITORY / "docs", json.loads(chosen.page.read_text(encoding="utf-8")))
        return 0
    chosen.cache.mkdir(parents=True, exist_ok=True)
    peak = _run(chosen, {"kind": "peak"}, "peak")
    if "failed" in peak:
        print(f"no GPU to measure: {peak['failed']}", file=sys.stderr)
        return 1
    task = {key: getattr(chosen, key) for key in ("size", "steps", "pictures")}
    written: dict[str, Any] = {"task": {**task, "guidance": GUIDANCE}, "peak": peak, "variants": {}}
    print(f"{peak['device']}: {peak['flops'] / 1e12:.0f} TFLOP/s fp16", flush=True)
    try:
        _make(chosen)
    except MakeError as error:
        print(error, file=sys.stderr)
        return 1
    for number, variant in enumerate(chosen.variants):
        everywhere = [*ELSEWHERE, *(name for name in here() if "backend" in CONTENDERS[name][1])]
        names = list(chosen.contenders or (here() if number == 0 else everywhere))
        part: dict[str, Any] = {"work": _work(chosen, variant), "rounds": []}
        written["variants"][variant] = part
        for turn in range(chosen.rounds if number == 0 else 1):
            part["rounds"].append({})
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                batched = name in ELSEWHERE or "backend" in CONTENDERS[name][1]
                larger = chosen.batches if number == turn == 0 and batched else []
                batches = [1, *(batch for batch in larger if batch != 1)]
                part["rounds"][-1][name] = _contend(chosen, variant, name, {**task, "batches": batches})
                print(f"{variant:8} {name:34} {line(part['rounds'][-1][name])}", flush=True)
                _save(chosen.json, written)
            for name, result in part["rounds"][-1].items():
                result["psnr"] = _psnr(*(chosen.cache / variant / f"{_plain(one)}.npy" for one in (name, EAGER)))
    written["figures"] = figures(written)
    _save(chosen.json, written)
    print(json.dumps(written["figures"], indent=1))
    return 1 if faults(written) else 0


def here() -> list[str]:
    """Contenders whose library is installed and builds for this GPU."""
    backends = {name: options.get("backend") for name, (_, options) in CONTENDERS.items()}
    return [name for name, backend in backends.items() if backend is None or _builds(backend)]


def _builds(library: str) -> bool:
    try:
        tensorrt_versions.target(tensorrt_versions.installed(library), None)
    except ExportError:
        return False
    return True


def faults(written: dict[str, Any]) -> list[str]:
    """Why a run does not pass: contenders of ours that failed or drew another picture, and aims that were missed."""
    found: list[str] = []
    for variant, part in written["variants"].items():
        for one in part["rounds"]:
            for name, result in one.items():
                if CONTENDERS[name][0] == "ours" and "failed" in result:
                    found.append(f"{variant}, {name}: {result['failed']}")
                elif result.get("psnr") is not None and result["psnr"] < SAME_PICTURE:
                    found.append(f"{variant}, {name}: {result['psnr']:.1f} dB to the picture of {EAGER}")
    return [*found, *(name for name, aim in written["figures"]["aims"].items() if not aim["met"])]


def _psnr(one: Path, other: Path) -> float | None:
    """dB between two saved pictures; None where one is not there."""
    if not (one.is_file() and other.is_file()):
        return None
    return decibels(np.load(one), np.load(other))


def _contend(chosen: argparse.Namespace, variant: str, name: str, task: dict[str, Any]) -> dict[str, Any]:
    kind, options = CONTENDERS[name]
    folder = chosen.cache / variant
    (folder / f"{_plain(name)}.npy").unlink(missing_ok=True)
    return _run(
        chosen,
        {
            **task,
            "kind": kind,
            "options": options,
            "model": str(folder / MODELS[kind]),
            "prompt": PROMPT,
            "seed": SEED,
            "guidance": GUIDANCE,
            "picture": str(folder / f"{_plain(name)}.npy"),
        },
        f"{variant}-{_plain(name)}",
    )


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _run(chosen: argparse.Namespace, task: dict[str, Any], name: str) -> dict[str, Any]:
    """What a contender's process wrote, or why it wrote nothing under "failed"."""
    answer, log = chosen.cache / f"{name}.json", chosen.cache / f"{name}.log"
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu_contender.py"), json.dumps(task), str(answer)]
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, env=_environment(), timeout=chosen.limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {chosen.limit} s"}
    if code or not answer.is_file():
        said = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
        return {"failed": said[-1][:300] if said else f"exit code {code}"}
    return json.loads(answer.read_text())


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }


def _make(chosen: argparse.Namespace) -> None:
    """The models that are not there yet, or of other sources, side by side: each is made on a CPU. Raises MakeError."""

    def make(variant: str) -> None:
        folder = chosen.cache / variant
        stamp, made_by = folder / "made.txt", source_digest()
        if stamp.is_file() and stamp.read_text() == made_by:
            return
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, str(HERE / "gpu_make.py"), variant, str(folder)]
        run(command, f"model {variant}", chosen.cache / f"{variant}.log", _environment())
        stamp.write_text(made_by)

    with ThreadPoolExecutor(len(chosen.variants)) as pool:
        list(pool.map(make, chosen.variants))
    for name in chosen.contenders or here():
        library = CONTENDERS[name][1].get("backend")
        for variant in chosen.variants if library is not None else []:
            batches = {1, *chosen.batches} if variant == chosen.variants[0] else {1}
            for batch in sorted(batches):
                _build(chosen, str(library), chosen.cache / variant / "bundle", batch)


def _build(chosen: argparse.Namespace, library: str, bundle: Path, batch: int) -> None:
    """Engines of a bundle for one batch; those of larger ones in a copy beside it, whose name ends in -batch4 or so.

    What fails is said here, and again by the contender, which has none.
    """
    folder = bundle if batch == 1 else bundle.with_name(f"{bundle.name}-batch{batch}")
    if not folder.exists():
        leave_out = shutil.ignore_patterns(ENGINES_FOLDER)
        shutil.copytree(bundle, folder, copy_function=os.link, ignore=leave_out)
    command = [
        sys.executable,
        "-c",
        "from bksdm_export.build_cli import main; main()",
        str(folder),
    ]
    sizes = ["--library", library, "--height", str(chosen.size), "--width", str(chosen.size)]
    try:
        what = f"engines of {folder} for {library}"
        run([*command, *sizes, "--batch", str(batch)], what, chosen.cache / f"{library}.log", _environment())
    except MakeError as error:
        print(error, file=sys.stderr)


def _work(chosen: argparse.Namespace, variant: str) -> dict[str, float]:
    """FLOPs of a guided step, of a decode; MACs of the U-Net."""
    command = [sys.executable, str(HERE / "cpu_machine.py"), "work", str(chosen.cache / variant / "checkpoint")]
    said = subprocess.check_output([*command, str(chosen.size)], env=_environment(), text=True)
    return json.loads(said.splitlines()[-1])


def line(result: dict[str, Any]) -> str:
    """One process in one line."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    one = result["batches"]["1"]
    stages = ", ".join(f"{name} {median(seconds) * 1e3:.2f} ms" for name, seconds in one["stages"].items())
    more = "".join(
        f", batch {batch}: {int(batch) / median(part['seconds']):.1f} pictures/s"
        for batch, part in result["batches"].items()
        if batch != "1"
    )
    return f"{median(one['seconds']) * 1e3:.0f} ms a picture, {stages}{more}"


def figures(written: dict[str, Any]) -> dict[str, Any]:
    """Medians and 95th percentiles by variant, contender and batch, ratios to ours, and the aims."""
    found: dict[str, Any] = {"variants": {}}
    peak = written["peak"]["flops"]
    for variant, part in written["variants"].items():
        names = dict.fromkeys(name for one in part["rounds"] for name in one)
        found["variants"][variant] = {
            name: _of_contender([one.get(name, {"failed": "not run"}) for one in part["rounds"]], part, peak)
            for name in names
        }
        for name, mine in found["variants"][variant].items():
            if "failed" not in mine:
                mine["times_ours"] = _ratios(part["rounds"], name, OURS)
    first = next(iter(found["variants"]))
    ratios = _ratios(written["variants"][first]["rounds"], COMPILED, OURS)
    share = found["variants"][first].get(OURS, {}).get("1", {}).get("share")
    found["aims"] = {
        "a picture, times compiled diffusers": {
            "aim": AIMS["ratio"],
            "found": ratios,
            "met": bool(ratios and ratios[0] >= AIMS["ratio"]),
        },
        "share of the matrix peak in the U-Net": {
            "aim": AIMS["share"],
            "found": share,
            "met": bool(share and share >= AIMS["share"]),
        },
    }
    return found


def _of_contender(results: Sequence[dict[str, Any]], part: dict[str, Any], peak: float) -> dict[str, Any]:
    done = [result for result in results if "failed" not in result]
    if not done:
        return {"failed": results[0]["failed"]}
    found: dict[str, Any] = {
        "first_picture": median(result["first_picture"] for result in done),
        "memory": max((result["memory"] or 0) for result in done) or None,
        "versions": done[0]["versions"],
        "psnr": min((result["psnr"] for result in done if result.get("psnr") is not None), default=None),
    }
    for batch in done[0]["batches"]:
        parts = [result["batches"][batch] for result in done if batch in result["batches"]]
        seconds = sorted(s for one in parts for s in one["seconds"])
        stages = {name: median(s for one in parts for s in one["stages"][name]) for name in parts[0]["stages"]}
        flops = int(batch) * part["work"]["guided_step"] / stages["unet"]
        found[batch] = {
            "seconds": median(seconds),
            "slowest": seconds[-1],
            "p95": seconds[int(0.95 * len(seconds))] if len(seconds) > 20 else None,
            "pictures_per_second": int(batch) / median(seconds),
            "stages": stages,
            "evaluations_per_second": 1 / stages["unet"],
            "flops": flops,
            "share": flops / peak,
        }
    return found


def _ratios(rounds: Sequence[dict[str, Any]], name: str, reference: str) -> list[float] | None:
    """How many times as long as the reference a picture takes, in each round: [median, least, most]."""
    found = [
        median(one[name]["batches"]["1"]["seconds"]) / median(one[reference]["batches"]["1"]["seconds"])
        for one in rounds
        if all("batches" in one.get(which, {}) for which in (name, reference))
    ]
    return [median(found), min(found), max(found)] if found else None


def _save(path: Path, written: dict[str, Any]) -> None:
    half = path.with_name(f".{path.name}")
    half.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["tiny"], help="the first with all contenders and rounds")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="only these, everywhere")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8], help="besides 1")
    parser.add_argument("--size", type=int, default=512, help="pixels, square")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--pictures", type=int, default=20, help="of batch 1, timed in a process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1800, help="seconds that a process may take")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bksdm-gpu", help="models, kept")
    parser.add_argument("--json", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--page", type=Path, metavar="JSON", help="write docs/gpu.md from a report; measures nothing")
    chosen = parser.parse_args(arguments)
    if min(chosen.rounds, chosen.pictures, chosen.steps) < 1:
        parser.error("--rounds, --pictures and --steps are at least 1")
    chosen.cache = chosen.cache.resolve()
    return chosen


if __name__ == "__main__":
    sys.exit(main())
