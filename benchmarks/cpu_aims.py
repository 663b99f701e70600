"""What this runtime is meant to reach against its peers, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

AS_FAST = 0.97  # of GenAI's speed: it runs the same engine, so that only what is around the engine differs
OF_DIFFUSERS, OF_OPTIMUM, OF_ANY = 1.25, 2.0, 1.0

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """found: how many times better ours is than the peer named in `peer`, which is to be `aim` or more."""

    what: str
    peer: str
    found: float
    aim: float

    @property
    def reached(self) -> bool:
        return self.found >= self.aim


def judge(part: Mapping[str, Any], figures: Figures) -> list[dict[str, Any]]:
    """Verdicts on one variant's figures, with `reached`; of aims whose peer did not run there is none."""
    return [{**asdict(one), "reached": one.reached} for one in _verdicts(part["contenders"], figures)]


def _verdicts(results: list[Mapping[str, Any]], figures: Figures) -> Iterator[Verdict]:
    contenders, reference = figures["contenders"], figures["reference"]
    peers = {one["name"]: one for one in results if one["kind"] != "ours" and one["name"] in contenders}
    exact = {name: peer for name, peer in peers.items() if peer["exact"]}
    if reference is None or not exact:
        return
    ours = contenders[reference]

    def slowness(name: str) -> float:
        return contenders[name]["ratio"][0]

    for kind, aim in (("diffusers", OF_DIFFUSERS), ("optimum", OF_OPTIMUM), ("genai", AS_FAST), ("sdcpp", OF_ANY)):
        of_kind = [name for name, peer in exact.items() if peer["kind"] == kind]
        if of_kind:
            best = min(of_kind, key=slowness)
            yield Verdict("speed, exact", best, slowness(best), aim)
    for figure, what in (("first_picture", "time to the first picture"), ("peak", "peak memory")):
        values = {name: _number(contenders[name][figure]) for name in exact}
        best = min(values, key=lambda name: values[name])
        yield Verdict(what, best, values[best] / _number(ours[figure]), OF_ANY)
    best = min(exact, key=slowness)
    for result in results:
        if result["kind"] == "ours" and result["aim"] is not None and result["name"] in contenders:
            found = slowness(best) / contenders[result["name"]]["ratio"][0]
            yield Verdict(f"speed, {result['name']}", best, found, result["aim"])
    for name, peer in peers.items():
        if peer["twin"] in contenders:
            yield Verdict(f"speed, {peer['twin']}", name, slowness(name) / slowness(peer["twin"]), AS_FAST)


def _number(value: Any) -> float:
    return value[0] if isinstance(value, list) else value
