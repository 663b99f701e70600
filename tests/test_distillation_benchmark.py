"""benchmarks/distillation.py: what is trained and scored, going on after a failure, and the tables."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def benchmark(tmp_path: Path) -> dict[str, Any]:
    found = runpy.run_path(str(REPOSITORY / "benchmarks" / "distillation.py"))
    found["main"].__globals__.update(SCORES=tmp_path / "scores.json", PAGE=tmp_path / "page.md")
    return found


def _score(kid: float) -> dict[str, Any]:
    split = {
        "kid": {"value": kid},
        "fid": 100 * kid,
        "lpips_to_teacher": {"mean": kid / 2},
        "top1": 1 - kid,
        "top5": 1 - kid / 2,
        "generated": 200,
        "dataset_pictures": 269,
    }
    return {
        "student": {"unet_params": 5_650_000, "unet_macs": 199e6},
        "splits": {"train": split, "unseen": {**split, "generated": 16, "dataset_pictures": 16}},
    }


class Calls:
    """Stands where the commands run: writes what they would, or fails."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made: list[tuple[str, ...]] = []
        self.fail_at = fail_at

    def __call__(self, package: str, *arguments: str) -> bool:
        if len(self.made) == self.fail_at:
            return False
        self.made.append((package, *arguments))
        output = Path(next(a for a in arguments if a.startswith("--output=")).removeprefix("--output="))
        if package == "evaluation":
            output.write_text(json.dumps(_score(0.1)))
        elif arguments[0] == "distill":
            (output / "states").mkdir(parents=True, exist_ok=True)
            (output / "training.json").write_text('{"seconds": 7}')
        return True


def _arguments(tmp_path: Path) -> list[str]:
    return ["run", "--teacher", "T", "--data", "D", "-o", str(tmp_path / "runs"), "--seeds", "1", "--steps", "8"]


def test_every_arm_differs_from_distillation_in_one_thing(benchmark: dict[str, Any], tmp_path: Path) -> None:
    calls = Calls()
    benchmark["main"].__globals__["_call"] = calls
    assert benchmark["main"](_arguments(tmp_path)) == 0
    runs = [set(made) for made in calls.made if made[1] == "distill"]
    assert len(runs) == 9
    for first in (0, 3, 6):
        plain, task, random = runs[first : first + 3]
        others = [{option for option in run - plain if not option.startswith("--output=")} for run in (task, random)]
        assert others == [{"--output-weight=0", "--feature-weight=0"}, {"--start=random"}]
    assert not list((tmp_path / "runs").rglob("states"))
    written = json.loads((tmp_path / "scores.json").read_text())
    assert len(written) == 11
    assert written["benchmark"]["steps"] == 8
    assert written["tiny-random-start-0"]["training"] == {"seconds": 7}


def test_after_a_failure_it_goes_on_where_it_was(benchmark: dict[str, Any], tmp_path: Path) -> None:
    failing, calls = Calls(fail_at=9), Calls()
    benchmark["main"].__globals__["_call"] = failing
    assert benchmark["main"](_arguments(tmp_path)) == 1
    benchmark["main"].__globals__["_call"] = calls
    assert benchmark["main"](_arguments(tmp_path)) == 0
    scored = [made for made in (*failing.made, *calls.made) if made[0] == "evaluation"]
    assert len(scored) == len(set(scored)) == 10


def test_other_settings_in_the_same_folder_are_refused(
    benchmark: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark["main"].__globals__["_call"] = Calls()
    assert benchmark["main"](_arguments(tmp_path)) == 0
    assert benchmark["main"]([*_arguments(tmp_path), "--steps", "9"]) == 1
    assert "holds runs with other steps: choose another --output" in capsys.readouterr().err


def test_seeds_of_another_day_come_into_the_same_table_and_other_settings_do_not(
    benchmark: dict[str, Any], tmp_path: Path
) -> None:
    benchmark["main"].__globals__["_call"] = Calls()
    assert benchmark["main"](_arguments(tmp_path)) == 0
    other = ["run", "--teacher", "T", "--data", "D", "-o", str(tmp_path / "other"), "--seeds", "2", "--first-seed", "1"]
    assert benchmark["main"]([*other, "--steps", "8", "--jobs", "3"]) == 0
    written = json.loads((tmp_path / "scores.json").read_text())
    assert {name[-1] for name in written if name.startswith("tiny-distilled")} == {"0", "1", "2"}
    assert len(written) == 29
    assert benchmark["main"]([*other[:-4], "-o", str(tmp_path / "anew"), "--seeds", "1", "--steps", "9"]) == 0
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 11


def test_the_tables_show_means_spreads_and_wins(benchmark: dict[str, Any]) -> None:
    scores = {"teacher": _score(0.05)}
    for seed, (ours, task) in enumerate([(0.1, 0.2), (0.3, 0.2), (0.2, 0.4)]):
        scores[f"small-distilled-{seed}"], scores[f"small-task-only-{seed}"] = _score(ours), _score(task)
    page = f"before\n{benchmark['BEGIN']}\nold\n{benchmark['END']}\nafter\n"
    made = benchmark["with_tables"](page, scores)
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    [row] = [line for line in made.splitlines() if line.startswith("| small | distilled | 3")][:1]
    assert "0.2000 (0.1000 to 0.3000)" in row
    assert "5,650,000 | 199 M" in row
    assert "| small | task only | 2 of 3 | 2 of 3 | 2 of 3 | 2 of 3 | 2 of 3 |" in made
    assert "random start" not in made
    assert benchmark["with_tables"](made, scores) == made
