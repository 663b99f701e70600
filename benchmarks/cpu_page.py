"""The CPU benchmark's figures as Markdown tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_figures import SAME

BEGIN, END = "<!-- made by benchmarks/cpu.py --write -->", "<!-- end -->"
CHARTS = {"contenders": "images/cpu-contenders.png", "macs": "images/cpu-macs.png"}
_OURS, _PEER, _INK = "#c8442b", "#8a94a3", "#2b2f36"
Written = Mapping[str, Any]


def tables(written: Written) -> str:
    parts = [_conditions(written)]
    for variant, figures in written["figures"].items():
        work = written["variants"][variant]["work"]
        parts.append(
            f"### {variant}\n\nA guided step is {work['guided_step'] / 1e9:.0f} GFLOP, a decode "
            f"{work['decode'] / 1e9:.0f}. Ratios are to {figures['reference']}: above 1 is slower than it."
        )
        parts.append(_contenders(figures["contenders"]))
        parts.append(_batches(figures["contenders"]))
        parts.append(_aims(figures["aims"]))
    parts += [_compression(written), _absent(written)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(page: Path, written: Written) -> None:
    """Put the tables between the page's markers, and beside it the charts that it shows."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{tables(written)}\n{END}{after}", encoding="utf-8")
    if CHARTS["contenders"] in text:
        chart_contenders(page.parent / CHARTS["contenders"], written)
    if CHARTS["macs"] in text and len(written["figures"]) > 1:
        chart_macs(page.parent / CHARTS["macs"], written)


def _conditions(written: Written) -> str:
    machine, task = written["machine"], written["task"]
    peaks = {name: max(peak[name] for peak in written["peaks"]) for name in written["peaks"][0]}
    versions: dict[str, set[str]] = {}
    for part in written["variants"].values():
        for result in part["contenders"]:
            for sample in result["samples"]:
                for name, version in sample["versions"].items():
                    versions.setdefault(name, set()).add(version)
    bf16 = "with bf16" if machine["bf16"] else "no bf16"
    rounds = f"{task['rounds']} round" + "s" * (task["rounds"] > 1)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {task['threads']} threads, {bf16}, "
        f"{machine['memory'] / 2**30:.0f} GiB; measured peak, GFLOP/s: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in peaks.items())
        + f". {task['size']} px, {task['steps']} Euler steps, guidance on, batch 1, {rounds}.\n\n"
        + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
        + "."
    )


def _contenders(figures: Mapping[str, Any]) -> str:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "picture s": lambda f: f"{f['seconds'][0]:.1f}",
        "ratio": lambda f: _spread(f["ratio"]),
        "in CPU s": lambda f: _spread(f["cpu_ratio"]),
        "text s": lambda f: _seconds(f["text"]),
        "step s": lambda f: _seconds(f["step"]),
        "decode s": lambda f: _seconds(f["decode"]),
        "of peak": lambda f: "" if f["share_of_peak"] is None else f"{f['share_of_peak']:.0%}",
        "peak GB": lambda f: f"{f['peak'] / 1e9:.2f}",
        "first step s": lambda f: f"{f['first_step'][0]:.1f}",
        "first picture s": lambda f: f"{f['first_picture'][0]:.1f}",
        "PSNR dB": lambda f: _decibels(f["psnr"]),
    }
    ordered = sorted(figures, key=lambda name: figures[name]["seconds"][0])
    return _table(
        ["contender", *columns], [[name, *(make(figures[name]) for make in columns.values())] for name in ordered]
    )


def _aims(aims: Sequence[Mapping[str, Any]]) -> str:
    if not aims:
        return ""
    rows = [
        [
            aim["what"],
            aim["peer"],
            f"{aim['found']:.2f}",
            f"{aim['aim']:.2f}",
            "reached" if aim["reached"] else "MISSED",
        ]
        for aim in aims
    ]
    head = ["aim", "best peer of the kind", "times better", "to be", ""]
    return "Ours against its aims:\n\n" + _table(head, rows)


def _batches(figures: Mapping[str, Any]) -> str:
    sizes = sorted({int(size) for one in figures.values() for size in one["pictures_per_minute"]})
    if sizes == [1]:
        return ""
    rows = []
    for name, one in figures.items():
        rates = {int(size): rate for size, rate in one["pictures_per_minute"].items()}
        rows.append([name, *(f"{rates[size]:.2f}" if size in rates else "-" for size in sizes)])
    return "Pictures a minute by batch:\n\n" + _table(["contender", *(str(size) for size in sizes)], rows)


def _compression(written: Written) -> str:
    """How much of the MACs that were saved is saved as time, against the variant with the most."""
    works = {variant: part["work"] for variant, part in written["variants"].items()}
    if len(works) < 2:
        return ""
    full = max(works, key=lambda variant: works[variant]["guided_step"])
    rows = []
    for name in written["figures"][full]["contenders"]:
        for variant, work in sorted(works.items(), key=lambda item: item[1]["guided_step"]):
            found, whole = (written["figures"][v]["contenders"].get(name) for v in (variant, full))
            if found is None or whole is None:
                continue
            saved = 1 - work["guided_step"] / works[full]["guided_step"]
            arrived = 1 - found["step"] / whole["step"]
            rows.append(
                [
                    *(name, variant, f"{work['macs'] / 1e9:.0f}", f"{work['guided_step'] / 1e9:.0f}"),
                    *(f"{found['step']:.2f}", f"{found['seconds'][0]:.1f}"),
                    f"{whole['seconds'][0] / found['seconds'][0]:.2f}",
                    f"{arrived / saved:.0%}" if saved else "-",
                ]
            )
    head = ["contender", "variant", "GMACs", "step GFLOP", "step s", "picture s", f"times {full}'s speed"]
    return (
        "### Does compression pay?\n\nThe last column: how much of the FLOPs that a step saves it saves as time.\n\n"
        + _table([*head, "arrives"], rows)
    )


def _absent(written: Written) -> str:
    rows = [
        [variant, result["name"], (result["skipped"] or result["failed"]).replace("|", "/")]
        for variant, part in written["variants"].items()
        for result in part["contenders"]
        if result["skipped"] or result["failed"]
    ]
    return "### Not measured\n\n" + _table(["variant", "contender", "why"], rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _spread(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    middle, least, most = values
    return f"{middle:.2f}" if least == most else f"{middle:.2f} ({least:.2f} to {most:.2f})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else "the same" if value == SAME else f"{value:.0f}"


def chart_contenders(path: Path, written: Written) -> None:
    """Seconds a picture as a ratio to ours, one bar each, fastest first; the line is the spread over rounds."""
    from matplotlib import pyplot as plt

    variant, figures = next(iter(written["figures"].items()))
    shown = {name: one for name, one in figures["contenders"].items() if one["ratio"] is not None}
    ordered = sorted(shown, key=lambda name: shown[name]["ratio"][0], reverse=True)
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.42 * len(ordered)), layout="constrained")
    widest = max(one["ratio"][2] for one in shown.values())
    exact = {result["name"] for result in written["variants"][variant]["contenders"] if result["exact"]}
    for place, name in enumerate(ordered):
        middle, least, most = shown[name]["ratio"]
        colour = _OURS if name.startswith("ours") else _PEER
        axes.barh(place, middle, height=0.62, color=colour, alpha=1 if name in exact else 0.5)
        axes.plot([least, most], [place, place], color=_INK, linewidth=1.4, marker="|", markersize=7)
        label = f"{middle:.2f}   {shown[name]['seconds'][0]:.1f} s"
        axes.text(most + 0.015 * widest, place, label, va="center", fontsize=9, color=_INK)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, widest * 1.22)
    task, machine = written["task"], written["machine"]
    pale = "" if exact >= shown.keys() else ", pale is approximate"
    axes.set_xlabel(f"time of a picture / {figures['reference']}; shorter is faster{pale}", fontsize=9)
    axes.set_title(
        f"{variant}, {task['size']} px, {task['steps']} steps: {machine['cpu']}, {task['threads']} threads",
        loc="left",
        fontsize=10,
    )
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def chart_macs(path: Path, written: Written) -> None:
    """Seconds of a guided step against its FLOPs, one line for each contender that ran more than one variant."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    parts = sorted(written["variants"].items(), key=lambda item: item[1]["work"]["guided_step"])
    names = {name for figures in written["figures"].values() for name in figures["contenders"]}
    for number, name in enumerate(sorted(names)):
        points = [
            (part["work"]["guided_step"] / 1e9, written["figures"][variant]["contenders"][name]["step"])
            for variant, part in parts
            if name in written["figures"][variant]["contenders"]
        ]
        if len(points) < 2:
            continue
        ours = name.startswith("ours")
        across, up = zip(*points, strict=True)
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(across, up, style, marker="o", markersize=5, color=_OURS if ours else _PEER, label=name)
        whole = (0, across[-1])
        axes.plot(whole, (0, up[-1]), color=_INK, linewidth=0.5, alpha=0.35)  # where all of the saving arrives
    for number, (variant, part) in enumerate(parts):
        place, above = part["work"]["guided_step"] / 1e9, 4 + 13 * (number % 2)  # points: small and base are neighbours
        axes.annotate(variant, (place, 0), (0, above), textcoords="offset points", ha="center", fontsize=9, color=_INK)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GFLOP of a guided step (thin lines: time in proportion to them)")
    axes.set_ylabel("seconds a guided step")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _plain(axes)
    _save(figure, path)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
