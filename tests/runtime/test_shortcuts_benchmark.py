"""benchmarks/shortcuts.py: what is drawn and compared, and the table."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bksdm_export import likeness

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "benchmarks" / "shortcuts.py"))


@pytest.fixture(scope="module")
def scores(
    benchmark: dict[str, Any], make_toy_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shortcuts")
    captions = folder / "metadata.jsonl"
    captions.write_text("\n".join(json.dumps({"text": f"picture {i}"}) for i in range(5)) + "\n")
    bundle = make_toy_bundle(folder / "bundle", step_cache=True)
    other = make_toy_bundle(folder / "other", step_cache=True)
    with_fewer_tokens(other)
    options = ["--count=3", "--steps=10", "--sampler=euler", "--backend=onnxruntime", "--threads=1"]
    places = [f"--scores={folder / 'scores.json'}", f"--grid={folder / 'grid.png'}"]
    # LPIPS itself is tested elsewhere, and its weights come from a package.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(likeness, "Lpips", lambda: lambda a, b: torch.abs(a - b).mean())
        assert (
            benchmark["main"](
                ["run", f"--bundle={bundle}", f"--captions={captions}", "--downsampled", str(other), *options, *places]
            )
            == 0
        )
    assert (folder / "grid.png").is_file()
    return json.loads((folder / "scores.json").read_text())


def with_fewer_tokens(folder: Path) -> None:
    """A bundle that says so; its graphs are as they were."""
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "token_downsampling": 2}))


def test_every_shortcut_is_compared_on_every_caption(benchmark: dict[str, Any], scores: dict[str, Any]) -> None:
    assert scores["captions"] == 3
    by_2 = ["--token-downsampling 2", "--token-downsampling 2 --cache-interval 3"]
    assert list(scores["shortcuts"]) == [*benchmark["SHORTCUTS"], *by_2]
    for name, row in scores["shortcuts"].items():
        assert all(len(row[figure]) == 3 for figure in ("psnr", "lpips", "ratio"))
        exact = name == by_2[0]  # the toy has no tokens
        assert all(psnr == 99 if exact else 0 < psnr < 99 for psnr in row["psnr"])


def test_the_share_of_evaluations_is_counted_by_hand(scores: dict[str, Any]) -> None:
    shares = {name: row["halves"] for name, row in scores["shortcuts"].items()}
    assert shares["--cache-interval 3"] == 4 / 10  # 0, 3, 6, 9
    assert shares["--guidance-interval 0 0.8"] == (8 * 2 + 2) / 20
    assert shares["--cache-interval 3 --guidance-interval 0 0.8"] == (3 * 2 + 1) / 20


def test_the_table_says_what_was_measured(benchmark: dict[str, Any], scores: dict[str, Any]) -> None:
    page = benchmark["with_table"](f"before\n\n{benchmark['BEGIN']}\nold\n{benchmark['END']}\n\nafter\n", scores)
    assert page.startswith("before\n\n")
    assert page.endswith("\n\nafter\n")
    assert "old" not in page
    assert "3 captions, 10 EULER steps, guidance 7.5, 64 x 64 px, onnxruntime, 1 thread(s)" in page
    row = scores["shortcuts"]["--cache-interval 2"]
    assert f"| `--cache-interval 2` | {np.median(row['psnr']):.1f} (" in page
    assert "| 50% |" in page
