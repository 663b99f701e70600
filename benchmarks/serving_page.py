"""The comparison of two servers as a table of docs/serving.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from serving_compare import OURS, PLAIN

BEGIN, END = "<!-- made by benchmarks/serving.py page -->", "<!-- end -->"
AIM, AT = 1.3, 8  # times the plain layout's throughput, at so many clients


def write(page: Path, found: Mapping[str, Any]) -> None:
    """Put the table between its markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    rows = [
        f"Triton {found['triton']}, {found['machine']}, {found['threads']} threads, ONNX Runtime "
        f"{found['onnxruntime']}, {found['model']}, {found['steps']} steps, turns of {found['seconds']:g} s; "
        "latency in seconds.",
        "",
        "| clients | ours, pictures/s | p50 | p90 | p99 | plain, pictures/s | p50 | p90 | p99 | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for clients in sorted({turn["clients"] for turn in found["turns"]}):
        cells = [cell for server in (OURS, PLAIN) for cell in _cells(_turns(found, server, clients))]
        rows.append(f"| {clients} | {' | '.join(cells)} | {_shown(ratios(found, clients))} |")
    return "\n".join(rows)


def ratios(found: Mapping[str, Any], clients: int) -> list[float]:
    """Ours over plain, a round each."""
    ours, plain = (
        {turn["round"]: turn["per_second"] for turn in _turns(found, server, clients)} for server in (OURS, PLAIN)
    )
    return sorted(ours[turn] / plain[turn] for turn in ours)


def is_met(found: Mapping[str, Any]) -> bool:
    """Whether the aim is; at other numbers of clients there is none."""
    measured = {turn["clients"] for turn in found["turns"]}
    return AT not in measured or median(ratios(found, AT)) >= AIM


def _turns(found: Mapping[str, Any], server: str, clients: int) -> list[Mapping[str, Any]]:
    return [turn for turn in found["turns"] if (turn["server"], turn["clients"]) == (server, clients)]


def _cells(turns: list[Mapping[str, Any]]) -> list[str]:
    latencies = [one for turn in turns for one in turn["latencies"]]
    percentiles = np.percentile(latencies, [50, 90, 99]).tolist()
    return [f"{median(turn['per_second'] for turn in turns):.2f}", *(f"{one:.2f}" for one in percentiles)]


def _shown(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
