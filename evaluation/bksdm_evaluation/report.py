"""One self-contained page: the published COCO scores beside whatever was measured, and every figure's own file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bksdm.html_page import document, image, table
from bksdm.variants import PAPER, VARIANTS

_SHOWN = 4  # worst pairs of each comparison
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LABEL, _LINE = 460, 270, 52, 12, 26, 90, 13  # of a chart, in its own units
_PUBLISHED, _MEASURED = "var(--soft)", "#c8442b"
_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.2rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.pair div { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; } svg text { fill: currentColor; }
svg .axis { stroke: var(--line); } th, td { padding: .3rem .5rem; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; }
"""


class ReportError(Exception):
    """A file that is no result; the message is one sentence."""


@dataclass(frozen=True)
class Point:
    """One place in a chart."""

    x: float
    y: float
    label: str
    measured: bool


def read(path: Path) -> dict[str, Any]:
    """A file of `score` or of `compare`. Raises ReportError."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("scores"), dict) or "protocol" not in found:
            raise ValueError("it has no scores, or no protocol")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ReportError(f"{path} is no result of bksdm-eval score or compare: {error}") from None
    return found


def page(paths: Sequence[Path]) -> str:
    """The page of these result files. Raises ReportError."""
    results = [(path, read(path)) for path in paths]
    scores = [(path, one) for path, one in results if "questions" not in one]
    gates = [(path, one) for path, one in results if "questions" in one]
    body = [
        "<h1>COCO scores</h1>",
        f'<p class="soft">Published: {escape(PAPER)}. Measured: each row says its protocol and how many pictures, and '
        "names its file. Scores of another protocol, another number of pictures or other real pictures cannot be "
        "compared.</p>",
        "<h2>Scores</h2>",
        _scores(scores),
        "<h2>Scores against work</h2>",
        _charts(scores),
        *(_gate(path, one) for path, one in gates),
    ]
    return document("COCO scores", "\n".join(part for part in body if part) + "\n", _STYLE)


def _scores(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    head = ("model", "protocol", "pictures", "KID", "FID", "IS", "CLIP", "U-Net, M", "GMAC", "s a picture", "from")
    rows = [
        (
            escape(variant.name),
            "published",
            "30,000",
            "",
            f"{variant.scores.fid:.2f}",
            f"{variant.scores.is_:.2f}",
            f"{variant.scores.clip:.4f}",
            f"{variant.unet_params / 1e6:.0f}",
            f"{variant.macs / 1e9:.0f}",
            "",
            "published",
        )
        for variant in VARIANTS.values()
        if variant.scores is not None
    ]
    for path, one in results:
        found = one["scores"]
        known = VARIANTS.get(_variant(one))
        rows.append(
            (
                f"<b>{escape(_label(path, one))}</b>",
                escape(f"{one['protocol']}, {one['size']} px"),
                f"{one['pictures']:,}",
                _with_error(found.get("kid"), "value", "standard_error", 5),
                _fid(found.get("fid")),
                _with_error(found.get("inception_score"), "mean", "deviation", 2)
                + " (biased)" * found.get("inception_score", {}).get("biased", False),
                _clip(found.get("clip")),
                "" if known is None else f"{known.unet_params / 1e6:.0f}",
                "" if known is None else f"{known.macs / 1e9:.0f}",
                "" if one.get("latency") is None else f"{one['latency']:g}",
                escape(path.name),
            )
        )
    return table(head, rows)


def _variant(one: Mapping[str, Any]) -> str:
    generation = one.get("generation") or {}
    return str(generation.get("model", {}).get("variant", ""))


def _label(path: Path, one: Mapping[str, Any]) -> str:
    return one.get("label") or _variant(one) or path.stem


def _with_error(found: Mapping[str, Any] | None, value: str, error: str, digits: int) -> str:
    return "" if found is None else f"{found[value]:.{digits}f} &plusmn; {found[error]:.{digits}f}"


def _fid(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['value']:.2f}" + " (biased)" * found["biased"]


def _clip(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f'{found["value"]:.4f}<br><span class="soft">{escape(found["network"])}</span>'


def _charts(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    published = [one for one in VARIANTS.values() if one.scores is not None]
    readers: Mapping[str, tuple[str, Callable[[Any], float]]] = {
        "FID": ("fid", lambda scores: scores.fid),
        "CLIP score": ("clip", lambda scores: scores.clip),
    }
    charts: list[str] = []
    for title, (key, read_published) in readers.items():
        points = [Point(one.macs / 1e9, read_published(one.scores), one.name, False) for one in published]
        for path, one in results:
            known = VARIANTS.get(_variant(one))
            if known is not None and key in one["scores"]:
                points.append(Point(known.macs / 1e9, one["scores"][key]["value"], _label(path, one), True))
        charts.append(chart(f"{title} against GMAC of an evaluation", points))
    for title, field in (("seconds a picture", "latency"), ("training iteration", "iteration")):
        for key in ("kid", "fid", "clip"):
            points = [
                Point(float(one[field]), one["scores"][key]["value"], _label(path, one), True)
                for path, one in results
                if one.get(field) is not None and key in one["scores"]
            ]
            if points:
                charts.append(chart(f"{key.upper()} against {title}", points, joined=field == "iteration"))
    key = (
        f'<p class="soft"><span class="key" style="background:{_PUBLISHED}"></span> published '
        f'<span class="key" style="background:{_MEASURED}"></span> measured here</p>'
    )
    return f'{key}<div class="charts">{"".join(charts)}</div>'


def chart(title: str, points: Sequence[Point], *, joined: bool = False) -> str:
    """Points as SVG, each with its name; joined: by a line, in the order of x."""
    across, up = _Axis.of([point.x for point in points]), _Axis.of([point.y for point in points])
    bottom = _HEIGHT - _BOTTOM

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + across.share(point.x) * (_WIDTH - _LEFT - _LABEL)
        y = bottom - up.share(point.y) * (bottom - _TOP)
        return round(x, 1), round(y, 1)

    parts = [
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<line class="axis" x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{bottom}"/>',
        f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH}" y2="{bottom}"/>',
    ]
    for value in up.ticks:
        _, y = place(Point(across.low, value, "", False))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.6g}</text>')
    for value in across.ticks:
        x, _ = place(Point(value, up.low, "", False))
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value:,.6g}</text>')
    if joined:
        line = " ".join(f"{x},{y}" for x, y in map(place, sorted(points, key=lambda point: point.x)))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_MEASURED}"/>')
    placed = [(*place(point), point) for point in points]
    for group in _near(placed):
        left = max(x for x, _, _ in group) + 14
        heights = _spread([y for _, y, _ in group], bottom)
        for (x, y, point), height in zip(group, heights, strict=True):
            colour = _MEASURED if point.measured else _PUBLISHED
            parts += [
                f'<line class="axis" x1="{x}" y1="{y}" x2="{left - 3}" y2="{height}"/>',
                f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"><title>{escape(point.label)}: {point.y:.5g}</title>',
                f'</circle><text x="{left}" y="{height + 4}">{escape(point.label)}</text>',
            ]
    return "".join([*parts, f"</svg><figcaption>{escape(title)}</figcaption></figure>"])


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> _Axis:
        """Around the values, with ticks at round numbers."""
        low, high = min(values), max(values)
        margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
        step = 10 ** np.floor(np.log10((high - low) / 3))
        step = float(next(step * times for times in (5, 2, 1) if (high - low) / (step * times) >= 3))
        first = int(np.ceil(low / step))
        return cls(low, high, tuple(step * k for k in range(first, int(np.floor(high / step)) + 1)))

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


_Placed = tuple[float, float, Point]


def _near(placed: Sequence[_Placed]) -> list[list[_Placed]]:
    """Groups of points whose labels could meet, each from top to bottom."""
    groups: list[list[_Placed]] = []
    for one in sorted(placed, key=lambda one: one[0]):
        if groups and one[0] - groups[-1][-1][0] < _LABEL:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [sorted(group, key=lambda one: one[1]) for group in groups]


def _spread(heights: Sequence[float], bottom: float) -> list[float]:
    """Rising heights, moved as little as leaves a line's height between them, none past the bottom."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + _LINE) if moved else max(height, _TOP))
    excess = moved[-1] - bottom + _LINE
    for i in reversed(range(len(moved))):
        limit = bottom - _LINE if i == len(moved) - 1 else moved[i + 1] - _LINE
        moved[i] = min(moved[i], limit) if excess > 0 else moved[i]
    return moved


def _gate(path: Path, found: Mapping[str, Any]) -> str:
    """A comparison: its questions, and its worst pairs where their files are still there."""
    answers = {True: '<span class="good">passed</span>', False: '<span class="bad">failed</span>', None: "not told"}
    rows = [
        (escape(q["what"]), escape(q["found"]), escape(q["accepted"]), answers[q["passed"]]) for q in found["questions"]
    ]
    verdict = ("good", "passes") if found["passed"] else ("bad", "does not pass")
    said = (
        f"{found['pairs']:,} pairs, {found['protocol']} protocol, {found['size']} px, intervals at {found['level']:.0%}"
    )
    pairs = "".join(
        f"<figure><div>{shown}</div><figcaption>{escape(one['name'])}: {one['psnr']:.1f} dB, LPIPS {one['lpips']:.3f}"
        "</figcaption></figure>"
        for one in found["worst"][:_SHOWN]
        if (shown := _pair(found.get("folders", ()), one["name"]))
    )
    worst = f'<p class="soft">The worst pairs, the first set on the left.</p><div class="pair">{pairs}</div>'
    return (
        f"<h2>{escape(path.name)}</h2>"
        f'<p class="verdict {verdict[0]}">The second set {verdict[1]} beside the first.</p>'
        f'<p class="soft">{escape(said)}</p>'
        + table(("question", "found", "accepted", ""), rows)
        + (worst if pairs else "")
    )


def _pair(folders: Sequence[str], name: str) -> str:
    shown: list[str] = []
    for folder in folders:
        for suffix in (".png", ".jpg"):
            file = Path(folder) / f"{name}{suffix}"
            if file.is_file():
                with Image.open(file) as picture:
                    shown.append(image(np.asarray(picture.convert("RGB")), name))
                break
    return "".join(shown) if len(shown) == len(folders) else ""
