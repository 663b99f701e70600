"""The GPU benchmark's figures as Markdown tables and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu

BEGIN, END = "<!-- made by benchmarks/gpu.py --page -->", "<!-- end -->"
CHART = "images/gpu-contenders.png"
_OURS, _PEER, _INK = "#c8442b", "#8a94a3", "#2b2f36"


def write(docs: Path, written: Mapping[str, Any]) -> None:
    """Put the tables between the markers of docs/gpu.md, and the chart beside it."""
    page = docs / "gpu.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    figures = gpu.figures(dict(written))
    page.write_text(f"{before}{BEGIN}\n\n{tables(written, figures)}\n{END}{after}", encoding="utf-8")
    chart(docs / CHART, next(iter(figures["variants"].values())))


def tables(written: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    task, peak = written["task"], written["peak"]
    parts = [
        f"{peak['device']}, {peak['flops'] / 1e12:.0f} TFLOP/s in an 8192 x 8192 fp16 matrix product; "
        f"{task['size']} px, {task['steps']} PNDM steps (one evaluation more), guidance on, fp16, "
        f"{task['pictures']} pictures a process."
    ]
    for variant, contenders in figures["variants"].items():
        part = written["variants"][variant]
        parts.append(
            f"### {variant}\n\nA guided evaluation is {part['work']['guided_step'] / 1e9:.0f} GFLOP, a decode "
            f"{part['work']['decode'] / 1e9:.0f}. Ratio: how many times as long as ours."
        )
        parts += [_batch_one(contenders, part["rounds"]), _larger(contenders)]
    parts.append(
        "\n".join(
            f"- {name}: {_found(aim['found'])}, aim {aim['aim']:g}: {'met' if aim['met'] else 'missed'}"
            for name, aim in figures["aims"].items()
        )
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _batch_one(contenders: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    rows: list[list[str]] = []
    for name, mine in contenders.items():
        if "failed" in mine:
            rows.append([name, f"failed: {mine['failed']}", *[""] * 10])
            continue
        one, stages = mine["1"], mine["1"]["stages"]
        rows.append(
            [
                name,
                f"{one['seconds'] * 1e3:.0f}",
                f"{one['p95'] * 1e3:.0f}" if one["p95"] is not None else f"{one['slowest'] * 1e3:.0f} at most",
                _found(mine["times_ours"]),
                *(f"{stages[stage] * 1e3:.1f}" for stage in ("text", "unet", "decode")),
                f"{one['evaluations_per_second']:.0f}",
                f"{one['flops'] / 1e12:.0f}",
                f"{one['share']:.0%}",
                f"{mine['first_picture']:.1f}",
                "not compared" if mine["psnr"] is None else f"{mine['psnr']:.0f}",
                str(sum("batches" in one.get(name, {}) for one in rounds)),
            ]
        )
    columns = ["batch 1", "picture ms", "p95", "ratio", "text ms", "U-Net ms", "decode ms", "U-Net 1/s"]
    return _table([*columns, "TFLOP/s", "of peak", "first picture s", "PSNR dB", "processes"], rows)


def _larger(contenders: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            batch,
            f"{one['pictures_per_second']:.1f}",
            f"{one['stages']['unet'] * 1e3:.1f}",
            f"{one['flops'] / 1e12:.0f}",
            f"{one['share']:.0%}",
        ]
        for name, mine in contenders.items()
        for batch, one in mine.items()
        if batch.isdigit() and batch != "1"
    ]
    return _table(["", "batch", "pictures/s", "U-Net ms", "TFLOP/s", "of peak"], rows) if rows else ""


def _found(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.2f}"
    middle, least, most = value
    return f"{middle:.2f}" if least == most else f"{middle:.2f} ({least:.2f} to {most:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chart(path: Path, contenders: Mapping[str, Any]) -> None:
    """Milliseconds of a picture at batch 1, fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = {name: mine["1"]["seconds"] * 1e3 for name, mine in contenders.items() if "failed" not in mine}
    names = sorted(ran, key=lambda name: -ran[name])
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.1), dpi=150)
    colours = [_OURS if name.startswith("ours") else _PEER for name in names]
    bars = axes.barh(names, [ran[name] for name in names], color=colours, height=0.7)
    axes.bar_label(bars, fmt="%.0f", padding=3, color=_INK)
    axes.set_xlabel("milliseconds a picture, batch 1 (lower is better)", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
