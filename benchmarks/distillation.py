"""Does distillation pay? Students of the demo teacher, trained three ways for the same number of steps, and scored.

    python benchmarks/distillation.py run --teacher runs/demo/teacher/checkpoint --data data/emoji -o runs/distillation
    python benchmarks/distillation.py table -o runs/distillation

`run` trains and scores whatever is not scored yet, seed by seed, each as a process of its own; killed, it goes on. It
adds its scores to docs/distillation.json. `table` puts them into docs/distillation.md. Seeds may be run apart, on other
machines and days: with --first-seed, the same teacher and the same settings they come into the same table. A GPU is
used where there is one; --jobs trains several students at once on it (an H100 took 14 side by side under CUDA's MPS).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SCORES = REPOSITORY / "docs" / "distillation.json"
PAGE = REPOSITORY / "docs" / "distillation.md"
BEGIN, END = "<!-- made by benchmarks/distillation.py table -->", "<!-- end -->"
VARIANTS = ("base", "small", "tiny")
# Each differs from the first in one thing.
ARMS: Mapping[str, tuple[str, ...]] = {
    "distilled": (),
    "task only": ("--output-weight=0", "--feature-weight=0"),
    "random start": ("--start=random",),
}
# The demo teacher's own: batch, weight of timesteps, caption dropout (guidance needs it); no mirrored pictures, since
# the teacher never saw one. Half its learning rate.
SETTINGS = (
    "--batch-size=16",
    "--learning-rate=4e-4",
    "--warmup=100",
    "--decay-share=0.25",
    "--ema-decay=0.999",
    "--snr-gamma=5",
    "--caption-dropout=0.1",
    "--no-flip",
    "--shown=0",
)


@dataclass(frozen=True)
class Metric:
    """One column. path: where a score's JSON has it; lower: whether less is better; shown: how it is written."""

    title: str
    path: tuple[str, ...]
    lower: bool
    shown: Callable[[float], str]

    def of(self, score: Mapping[str, Any]) -> float:
        value: Any = score["splits"]
        for key in self.path:
            value = value[key]
        return float(value)


def _metrics(split: str, name: str) -> tuple[Metric, ...]:
    share = "{:.0%}".format
    return (
        Metric(f"KID{name}", (split, "kid", "value"), True, "{:.4f}".format),
        Metric(f"FID{name}", (split, "fid"), True, "{:.0f}".format),
        Metric(f"LPIPS to teacher{name}", (split, "lpips_to_teacher", "mean"), True, "{:.3f}".format),
        Metric(f"top-1{name}", (split, "top1"), False, share),
        Metric(f"top-5{name}", (split, "top5"), False, share),
    )


METRICS = {"train": _metrics("train", ""), "unseen": _metrics("unseen", "")}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 a run or a score failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score what is missing")
    run.add_argument("--teacher", required=True, help="checkpoint")
    run.add_argument("--data", type=Path, required=True, help="folder with train/ and unseen/")
    run.add_argument("--steps", type=int, default=2000)
    run.add_argument("--seeds", type=int, default=3, help="how many")
    run.add_argument("--first-seed", type=int, default=0)
    run.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    run.add_argument("--count", type=int, default=200, help="training captions that are drawn")
    run.add_argument("--threads", type=int)
    run.add_argument("--jobs", type=int, default=1, help="students trained and scored at once")
    run.add_argument("--workers", type=int, default=0, help="processes that read data, of each student")
    table = commands.add_parser("table", help="write the page's tables from the scores")
    for command in (run, table):
        command.add_argument("-o", "--output", type=Path, required=True, help="folder of the runs and their scores")
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        return _run(chosen)
    PAGE.write_text(with_tables(PAGE.read_text(), json.loads(SCORES.read_text())))
    return 0


def _run(chosen: argparse.Namespace) -> int:
    threads = [] if chosen.threads is None else [f"--threads={chosen.threads}"]
    scores: Path = chosen.output / "scores"
    scores.mkdir(parents=True, exist_ok=True)
    settings = _settings(chosen)
    if refusal := _another_run(chosen.output, settings):
        print(refusal, file=sys.stderr)
        return 1
    cached = chosen.output / "cache"
    teacher = [f"--teacher={chosen.teacher}"]

    def score(checkpoint: str, name: str) -> bool:
        grid = [f"--grid={scores / name}.png", f"--teacher-cache={chosen.output / 'teacher'}"]
        options = [*teacher, f"--data={chosen.data}", f"--count={chosen.count}", "--batch-size=100", *threads, *grid]
        return _call("evaluation", "student", checkpoint, *options, f"--output={scores / name}.json")

    failed = not _call(
        "training", "cache", *teacher, f"--data={chosen.data / 'train'}", f"--output={cached}", "--no-flip"
    )

    def score_teacher() -> None:
        nonlocal failed
        if not failed and not (scores / "teacher.json").is_file() and not score(chosen.teacher, "teacher"):
            failed = True

    def student(seed: int, variant: str, arm: str) -> None:
        nonlocal failed
        name = name_of(variant, arm, seed)
        if failed or (scores / f"{name}.json").is_file():
            return
        run = chosen.output / name
        trained = _call(
            "training",
            "distill",
            f"--variant={variant}",
            *teacher,
            f"--data={cached}",
            f"--output={run}",
            f"--steps={chosen.steps}",
            f"--checkpoint-every={max(1, chosen.steps // 4)}",
            f"--seed={seed}",
            f"--workers={chosen.workers}",
            *SETTINGS,
            *ARMS[arm],
            *threads,
        )
        if trained and score(str(run / "checkpoint"), name):
            shutil.rmtree(run / "states")  # only a run that goes on needs them
        else:
            failed = True  # those that run go on to their end

    with ThreadPoolExecutor(chosen.jobs) as pool:
        submitted = [pool.submit(score_teacher)]
        submitted += [
            pool.submit(student, seed, variant, arm)
            for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds)
            for variant in chosen.variants
            for arm in ARMS
        ]
    for one in submitted:
        one.result()  # raises what it raised
    collect(chosen.output, settings)
    return 1 if failed else 0


def _settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """What all scores of one table have in common."""
    weights = Path(chosen.teacher) / "unet" / "diffusion_pytorch_model.safetensors"
    return {
        "steps": chosen.steps,
        "count": chosen.count,
        "settings": list(SETTINGS),
        "teacher": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else chosen.teacher,
    }


def _another_run(output: Path, now: Mapping[str, Any]) -> str | None:
    """Scores of other settings or another teacher must not come into the same table."""
    path = output / "benchmark.json"
    if not path.is_file():
        path.write_text(json.dumps(now, indent=1) + "\n")
        return None
    then = json.loads(path.read_text())
    others = [key for key in now if then.get(key) != now[key]]
    return f"{output} holds runs with other {' and '.join(others)}: choose another --output" if others else None


def name_of(variant: str, arm: str, seed: int) -> str:
    """What a run's folder and score are called."""
    return f"{variant}-{arm.replace(' ', '-')}-{seed}"


def collect(output: Path, settings: Mapping[str, Any]) -> None:
    """All scores there are, with how their runs were trained, as one file: beside those of the same settings that it
    had, instead of any others."""
    found: dict[str, Any] = {}
    if SCORES.is_file():
        earlier = json.loads(SCORES.read_text())
        found = earlier if earlier.get("benchmark") == settings else {}
    found["benchmark"] = settings
    for path in sorted((output / "scores").glob("*.json")):
        found[path.stem] = json.loads(path.read_text())
        training = output / path.stem / "training.json"
        if training.is_file():
            found[path.stem]["training"] = json.loads(training.read_text())
    staging = SCORES.with_name(f".{SCORES.name}")
    staging.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    staging.replace(SCORES)


def with_tables(page: str, scores: Mapping[str, Any]) -> str:
    """The page with its tables made anew."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return "\n\n".join([f"{before}{BEGIN}", *tables(scores), f"{END}{after}"])


def tables(scores: Mapping[str, Any]) -> list[str]:
    """Scores of both splits, and how often distillation won."""
    parts = []
    for split, metrics in METRICS.items():
        example = scores["teacher"]["splits"][split]
        what = "training captions" if split == "train" else "captions of concepts that were never seen"
        parts.append(f"**{example['generated']} {what}**, against {example['dataset_pictures']} pictures:")
        parts.append(
            _table(
                ["model", "trained", "seeds", "parameters", "MACs", *(m.title for m in metrics)],
                [
                    _row("teacher", "", [scores["teacher"]], metrics),
                    *(
                        _row(variant, arm, found, metrics)
                        for variant in VARIANTS
                        for arm in ARMS
                        if (found := _scores_of(scores, variant, arm))
                    ),
                ],
            )
        )
    parts.append("**In how many seeds distillation was better**, on training captions:")
    rows = []
    for variant in VARIANTS:
        for other in list(ARMS)[1:]:
            wins = [_wins(scores, variant, other, metric) for metric in METRICS["train"]]
            if any(of for _, of in wins):
                rows.append([variant, other, *(f"{won} of {of}" for won, of in wins)])
    parts.append(_table(["student", "than", *(metric.title for metric in METRICS["train"])], rows))
    return parts


def _scores_of(scores: Mapping[str, Any], variant: str, arm: str) -> list[Any]:
    prefix = name_of(variant, arm, 0)[:-1]
    return [score for name, score in sorted(scores.items()) if name.startswith(prefix)]


def _row(model: str, arm: str, found: Sequence[Mapping[str, Any]], metrics: Iterable[Metric]) -> list[str]:
    about = found[0]["student"]
    cells = []
    for metric in metrics:
        values = [metric.of(score) for score in found]
        spread = f" ({metric.shown(min(values))} to {metric.shown(max(values))})" if len(values) > 1 else ""
        cells.append(metric.shown(mean(values)) + spread)
    seeds = str(len(found)) if arm else ""
    return [model, arm, seeds, f"{about['unet_params']:,}", f"{about['unet_macs'] / 1e6:,.0f} M", *cells]


def _wins(scores: Mapping[str, Any], variant: str, other: str, metric: Metric) -> tuple[int, int]:
    won = of = seed = 0
    while (ours := scores.get(name_of(variant, "distilled", seed))) is not None:
        if (theirs := scores.get(name_of(variant, other, seed))) is not None:
            a, b = metric.of(ours), metric.of(theirs)
            won, of = won + (a < b if metric.lower else a > b), of + 1
        seed += 1
    return won, of


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _call(package: str, *arguments: str) -> bool:
    """One of the project's commands, from this repository; its bar and its errors pass through."""
    folders = [str(REPOSITORY / folder) for folder in (".", "training", "evaluation", "runtime")]
    program = f"import sys; sys.path[:0] = {folders!r}; from bksdm_{package}.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
