"""The model repository under load, on a real tritonserver on this machine's CPU (`make .venv-triton/.ready`).

    python benchmarks/serving.py compare --json serving.json   ours against the plain published layout
    python benchmarks/serving.py soak --minutes 15             mixed load: no failed request, no growth, nothing leaked
    python benchmarks/serving.py page serving.json             writes docs/serving.md's table

`compare` runs both servers, with the same bundle and runtime, and asks them by turns, another first each round; every
prompt is new, so that no cache of texts helps. A client asks for its next picture when it has the last one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import serving_compare
import serving_page
import serving_soak

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _arguments(arguments)
    if chosen.command == "page":
        serving_page.write(HERE.parent / "docs" / "serving.md", json.loads(chosen.report.read_text(encoding="utf-8")))
        return 0
    with TemporaryDirectory() as folder:
        if chosen.command == "soak":
            report = serving_soak.soak(Path(folder), chosen.minutes * 60, chosen.seed)
            print(report.told())
            return 1 if report.faults() else 0
        found = serving_compare.compare(
            Path(folder), chosen.clients, chosen.rounds, chosen.seconds, chosen.steps, chosen.threads
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(serving_page.table(found))
    return 0 if serving_page.is_met(found) else 1


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare")
    compare.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    compare.add_argument("--rounds", type=int, default=3)
    compare.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    compare.add_argument("--steps", type=int, default=25)
    compare.add_argument("--threads", type=int, help="of each server  [default: one for each physical core]")
    compare.add_argument("--json", type=Path)
    soak = commands.add_parser("soak")
    soak.add_argument("--minutes", type=float, default=15.0)
    soak.add_argument("--seed", type=int, default=0)
    page = commands.add_parser("page")
    page.add_argument("report", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
