"""What was compared with PyTorch: parity.json for machines, parity.html for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bksdm_export.likeness import LPIPS_BOUND, PSNR_BOUND, Likeness
from bksdm_export.page import Figures, page
from bksdm_export.precision import Island, Sensitive
from bksdm_export.verify import ROUNDING, Parity, worst
from bksdm_runtime.bundle import Manifest

PARITY_JSON = "parity.json"
PARITY_HTML = "parity.html"


@dataclass(frozen=True)
class GraphFacts:
    """One exported graph. bytes: of its weights as stored; seconds: that its export took.

    precision: of its arithmetic; islands: modules kept fp32 in an fp16 graph; sensitive: layers kept fp32 in an int8
    one; sensitive_of: the bundle in which they were measured, where that is another.
    """

    nodes: int
    bytes: int
    seconds: float
    precision: str
    islands: tuple[Island, ...] = ()
    sensitive: tuple[Sensitive, ...] = ()
    sensitive_of: str | None = None


def write(
    folder: Path,
    parity: Parity,
    exported: Mapping[str, GraphFacts],
    manifest: Manifest,
    gate: Figures | None = None,
) -> dict[str, object]:
    """Write parity.json and parity.html, and return the figures that go into bundle.json. gate: its verdict, if any."""
    figures = summary(parity, exported)
    if gate is not None:
        figures["gate"] = gate
    (folder / PARITY_JSON).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / PARITY_HTML).write_text(page(figures, parity.pictures, manifest), encoding="utf-8")
    return brief(figures)


def write_failure(path: Path, parity: Parity, exported: Mapping[str, GraphFacts], manifest: Manifest, why: str) -> None:
    """Write the page of an export that failed, on its own."""
    path.write_text(page(summary(parity, exported), parity.pictures, manifest, why), encoding="utf-8")


def summary(parity: Parity, exported: Mapping[str, GraphFacts]) -> Figures:
    """Every figure, by component and by picture. An error that is infinite (nothing to compare) is None."""
    components = {
        name: {
            **asdict(exported[name]),
            "error": _finite(parity.worst(name).error),
            "tolerance": parity.tolerance.components[name],
            "cases": [{**asdict(one), "error": _finite(one.error)} for one in comparisons],
        }
        for name, comparisons in parity.components.items()
    }
    pictures = [
        {
            **asdict(one.picture.request),
            "mean_difference": _finite(one.mean),
            "largest_difference": _finite(one.largest),
            "note": one.note,
        }
        for one in parity.pictures
    ]
    figures: Figures = {
        "components": components,
        "pictures": pictures,
        "picture_tolerance": parity.tolerance.picture,
    }
    for name, comparisons in parity.fused.items():
        components[name]["fused_error"] = _finite(worst(comparisons).error)
    if parity.likenesses:
        figures["likeness"] = [_likeness(one) for one in parity.likenesses]
    if parity.rounding is not None:
        figures["rounding"] = {
            "storage": parity.rounding.storage,
            "mean_difference": _finite(parity.rounding.mean),
            "tolerance": ROUNDING,
        }
    return figures


def brief(figures: Figures) -> Figures:
    """What bundle.json carries: the figures without single cases and requests."""
    return {
        "components": {
            name: {
                key: graph[key] for key in ("error", "tolerance", "precision", "islands", "sensitive", "sensitive_of")
            }
            for name, graph in figures["components"].items()
        },
        "pictures": {
            "count": len(figures["pictures"]),
            "mean_difference": max(one["mean_difference"] for one in figures["pictures"]),
            "tolerance": figures["picture_tolerance"],
        },
        **{name: figures[name] for name in ("rounding", "likeness") if name in figures},
        **({"gate": {key: figures["gate"][key] for key in ("pairs", "questions")}} if "gate" in figures else {}),
    }


def _likeness(one: Likeness) -> Figures:
    return {
        "backend": one.backend,
        "psnr": {"mean": _finite(_mean(one.psnr)), "worst": _finite(min(one.psnr)), "bound": PSNR_BOUND},
        "lpips": {"mean": _finite(_mean(one.lpips)), "worst": _finite(max(one.lpips)), "bound": LPIPS_BOUND},
        "pictures": [
            {"psnr": _finite(psnr), "lpips": _finite(lpips)} for psnr, lpips in zip(one.psnr, one.lpips, strict=True)
        ],
    }


def _mean(figures: tuple[float, ...]) -> float:
    return sum(figures) / len(figures)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def table(folder: Path) -> str:
    """The figures of a bundle's parity.json as a table for a terminal."""
    figures = json.loads((folder / PARITY_JSON).read_text(encoding="utf-8"))
    rows = [("component", "nodes", "MB", "error", "accepted", "export s")]
    for name, graph in figures["components"].items():
        rows.append(
            (
                name,
                f"{graph['nodes']:,}",
                f"{graph['bytes'] / 1e6:,.1f}",
                f"{graph['error']:.1e}",
                f"{graph['tolerance']:.0e}",
                f"{graph['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    mean = max(picture["mean_difference"] for picture in figures["pictures"])
    count = len(figures["pictures"])
    lines.append(
        f"{count} pictures differ from PyTorch's by {mean:.3f}/255 on average at most "
        f"(accepted {figures['picture_tolerance']:g}/255)"
    )
    for one in figures.get("likeness", ()):
        psnr, lpips = one["psnr"], one["lpips"]
        lines.append(
            f"{one['backend']} against exact pictures: {psnr['mean']:.1f} dB PSNR, worst {psnr['worst']:.1f} "
            f"(accepted {psnr['bound']:g} or more); {lpips['mean']:.3f} LPIPS, worst {lpips['worst']:.3f} "
            f"(accepted {lpips['bound']:g} or less)"
        )
    if gate := figures.get("gate"):
        told = ", ".join(f"{one['what']} {one['found']}" for one in gate["questions"])
        lines.append(f"the gate of {gate['pairs']} pictures: {told}")
    kept = {name: len(graph["sensitive"]) for name, graph in figures["components"].items() if graph["sensitive"]}
    if kept:
        lines.append("layers kept in fp32: " + ", ".join(f"{count} of {name}" for name, count in kept.items()))
    if rounding := figures.get("rounding"):
        lines.append(
            f"rounding the weights to {rounding['storage']} changed PyTorch's own by "
            f"{rounding['mean_difference']:.3f}/255 (accepted {rounding['tolerance']:g}/255)"
        )
    return "\n".join(lines)
