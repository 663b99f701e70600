"""What the shortcuts of sampling cost in quality: pictures with each against exact ones of the same noise.

    bksdm-export --weights demo --storage fp16 --step-cache -o out/demo-cached
    bksdm-export --weights demo --storage fp16 --step-cache --token-downsampling 2 -o out/demo-by-2
    python benchmarks/shortcuts.py run --bundle out/demo-cached --downsampled out/demo-by-2 \
        --captions data/emoji/train/metadata.jsonl
    python benchmarks/shortcuts.py table

`run` draws every caption exactly and with each shortcut, interleaved, and writes docs/shortcuts.json: PSNR and LPIPS
of every pair, and the seconds of both. `table` puts it into docs/shortcuts.md, with a grid of the first pictures.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from bksdm_export.likeness import judge
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.evaluations import plan_evaluations
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import make_schedule

REPOSITORY = Path(__file__).resolve().parent.parent
SCORES = REPOSITORY / "docs" / "shortcuts.json"
PAGE = REPOSITORY / "docs" / "shortcuts.md"
GRID = REPOSITORY / "docs" / "images" / "shortcuts.png"
BEGIN, END = "<!-- made by benchmarks/shortcuts.py table -->", "<!-- end -->"
SHORTCUTS: Mapping[str, Mapping[str, Any]] = {
    "--cache-interval 2": {"cache_interval": 2},
    "--cache-interval 3": {"cache_interval": 3},
    "--cache-interval 5": {"cache_interval": 5},
    "--guidance-interval 0 0.8": {"guidance_interval": (0.0, 0.8)},
    "--guidance-interval 0 0.5": {"guidance_interval": (0.0, 0.5)},
    "--guidance-interval 0.2 0.8": {"guidance_interval": (0.2, 0.8)},
    "--cache-interval 3 --guidance-interval 0 0.8": {"cache_interval": 3, "guidance_interval": (0.0, 0.8)},
}
DOWNSAMPLED = ({}, {"cache_interval": 3})  # what a bundle with fewer tokens is drawn with
SHOWN = 6  # pictures in a row of the grid


@dataclass
class Shortcut:
    """One row: how it is asked for, and what it gave beside the exact pictures."""

    name: str
    pipeline: Pipeline
    saved: Mapping[str, Any]
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="draw, compare and write the scores")
    run.add_argument("--bundle", type=Path, required=True, help="exported with --step-cache")
    run.add_argument("--downsampled", type=Path, nargs="*", default=[], help="others, with --token-downsampling too")
    run.add_argument("--captions", type=Path, required=True, help="metadata.jsonl with a text in every line")
    run.add_argument("--count", type=int, default=64, help="captions, evenly spread")
    run.add_argument("--steps", type=int, default=25)
    run.add_argument("--sampler", default="pndm")
    run.add_argument("--backend", default="auto")
    run.add_argument("--threads", type=int)
    run.add_argument("--scores", type=Path, default=SCORES)
    run.add_argument("--grid", type=Path, default=GRID)
    table = commands.add_parser("table", help="put the scores into docs/shortcuts.md")
    table.add_argument("--scores", type=Path, default=SCORES)
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        scores = measure(chosen)
        chosen.scores.write_text(json.dumps(scores, indent=1) + "\n")
    else:
        PAGE.write_text(with_table(PAGE.read_text(), json.loads(chosen.scores.read_text())))
    return 0


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Every caption with every shortcut against the exact picture of the same noise."""
    bundle = bundles.load(chosen.bundle)
    settings = EngineSettings(chosen.backend, threads=chosen.threads)
    pipeline = Pipeline.open(bundle, settings)
    rows = [Shortcut(name, pipeline, saved) for name, saved in SHORTCUTS.items()]
    for folder in chosen.downsampled:
        other = Pipeline.open(folder, settings)
        flag = f"--token-downsampling {other.bundle.manifest.token_downsampling}"
        rows += [Shortcut(" ".join([flag, *_flags(saved)]), other, saved) for saved in DOWNSAMPLED]
    captions = _captions(chosen.captions, chosen.count)
    exact: list[NDArray[np.uint8]] = []
    for seed, caption in enumerate(tqdm(captions, disable=None, desc="captions")):
        plain = {"seed": seed, "steps": chosen.steps, "sampler": chosen.sampler}
        picture, seconds = _draw(pipeline, Request(caption, **plain))
        exact.append(picture)
        for row in rows:
            picture, shorter = _draw(row.pipeline, Request(caption, **plain, **row.saved))
            row.pictures.append(picture)
            row.ratios.append(seconds / shorter)
    _grid([one[:SHOWN] for one in (exact, *(row.pictures for row in rows))]).save(chosen.grid)
    evaluations = len(make_schedule(bundle.scheduler_config, steps=chosen.steps, sampler=chosen.sampler).timesteps)
    return {
        "bundle": bundle.sha256,
        "variant": bundle.manifest.variant,
        "backend": pipeline.backend,
        "threads": pipeline.threads,
        "machine": platform.processor() or platform.machine(),
        "captions": len(captions),
        "steps": chosen.steps,
        "sampler": chosen.sampler,
        "guidance": bundle.manifest.model.guidance_scale,
        "size": [bundle.manifest.model.height, bundle.manifest.model.width],
        "shortcuts": {row.name: _figures(row, exact, evaluations) for row in rows},
    }


def _figures(row: Shortcut, exact: Sequence[NDArray[np.uint8]], evaluations: int) -> dict[str, Any]:
    alike = judge(row.pipeline.backend, list(zip(row.pictures, exact, strict=True)))
    halves = _halves(evaluations, row.saved)
    return {"psnr": alike.psnr, "lpips": alike.lpips, "ratio": row.ratios, "halves": halves}


def _flags(saved: Mapping[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')} {value}" for name, value in saved.items()]


def with_table(page: str, scores: Mapping[str, Any]) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    height, width = scores["size"]
    said = (
        f"{scores['captions']} captions, {scores['steps']} {scores['sampler'].upper()} steps, guidance "
        f"{scores['guidance']:g}, {width} x {height} px, {scores['backend']}, {scores['threads']} thread(s), bundle "
        f"`{scores['bundle'][:12]}` ({scores['variant']}):"
    )
    head = ["shortcut", "PSNR dB, median (worst tenth)", "LPIPS, mean", "whole U-Net evaluations", "time, exact / this"]
    lines = [head, ["---"] * len(head)]
    for name, row in scores["shortcuts"].items():
        lines.append(
            [
                f"`{name}`",
                f"{median(row['psnr']):.1f} ({np.quantile(row['psnr'], 0.1):.1f})",
                f"{mean(row['lpips']):.4f}",
                f"{row['halves']:.0%}",
                f"{median(row['ratio']):.2f} ({min(row['ratio']):.2f} to {max(row['ratio']):.2f})",
            ]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([f"{before}{BEGIN}", said, table, f"{END}{after}"])


def _captions(path: Path, count: int) -> list[str]:
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [text if isinstance(text, str) else text[0] for text in texts]
    return [texts[int(i)] for i in np.linspace(0, len(texts) - 1, min(count, len(texts)))]


def _draw(pipeline: Pipeline, request: Request) -> tuple[NDArray[np.uint8], float]:
    started = time.perf_counter()
    [picture] = pipeline.draw([request])
    return picture, time.perf_counter() - started


def _halves(evaluations: int, saved: Mapping[str, Any]) -> float:
    """Share of whole single evaluations that remain, of two for each step."""
    planned = plan_evaluations(evaluations, guided=True, **saved)
    return sum(1 + one.guided for one in planned if one.full) / (2 * evaluations)


def _grid(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> Image.Image:
    """One row for each, in the table's order, the exact ones on top."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


if __name__ == "__main__":
    sys.exit(main())
