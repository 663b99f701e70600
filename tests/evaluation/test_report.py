"""The page of scores: what stands in it comes from the files, and charts keep their names apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bksdm.variants import VARIANTS
from bksdm_evaluation import cli, report
from bksdm_evaluation.report import Point, ReportError, chart, page

SCORES: dict[str, Any] = {
    "protocol": "clean",
    "size": 256,
    "pictures": 30_000,
    "generation": {"model": {"variant": "small"}},
    "scores": {
        "kid": {"value": 0.00712, "standard_error": 0.0003},
        "fid": {"value": 17.31, "biased": False},
        "inception_score": {"mean": 31.2, "deviation": 0.4, "biased": False},
        "clip": {"value": 0.2671, "network": "<ViT>"},
    },
    "label": None,
    "latency": 3.25,
    "iteration": None,
}


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_measured_scores_stand_beside_the_published_with_their_protocol_and_file(tmp_path: Path) -> None:
    trained = [
        write(tmp_path, f"at-{i}.json", {**SCORES, "iteration": i, "label": f"at {i} & on"}) for i in (5000, 10000)
    ]
    html = page([write(tmp_path, "small.json", SCORES), *trained])
    published = [one for one in VARIANTS.values() if one.scores is not None]
    assert len(published) == 11
    for one in published:
        assert f"<td>{one.name}</td><td>published</td><td>30,000</td>" in html
        assert f"<td>{one.scores.fid:.2f}</td>" in html
    row = re.search(r"<tr><td><b>small</b></td>.*?</tr>", html, re.S)
    assert row is not None
    for cell in (
        "clean, 256 px",
        "30,000",
        "0.00712 &plusmn; 0.00030",
        "17.31",
        "31.20 &plusmn; 0.40",
        "0.2671",
        "218",
    ):
        assert cell in row[0], cell
    assert "<td>3.25</td><td>small.json</td>" in row[0]
    assert "&lt;ViT&gt;" in row[0]
    assert "at 5000 &amp; on" in html
    for title in (
        "FID against GMAC",
        "CLIP score against GMAC",
        "KID against seconds",
        "FID against training iteration",
    ):
        assert title in html
    assert html.count("<polyline") == 3
    assert "http" not in html.replace("http-equiv", "")  # nothing is fetched


def test_a_comparison_shows_its_questions_and_its_worst_pairs(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((8, 8, 3), 40, np.uint8)).save(tmp_path / folder / "one.png")
    gate = {
        "protocol": "published",
        "size": 256,
        "pairs": 64,
        "level": 0.99,
        "passed": False,
        "scores": {},
        "folders": [str(tmp_path / "a"), str(tmp_path / "b")],
        "questions": [
            {"what": "PSNR", "found": "21.0 dB on average", "accepted": "28 or more", "passed": False},
            {"what": "drift of contrast", "found": "+1%", "accepted": "0.2%", "passed": None},
        ],
        "worst": [{"name": "one", "psnr": 12.3, "lpips": 0.4}, {"name": "gone", "psnr": 13.0, "lpips": 0.3}],
    }
    html = page([write(tmp_path, "gate.json", gate)])
    assert "does not pass beside the first" in html
    assert '<span class="bad">failed</span>' in html
    assert "64 pairs, published protocol, 256 px" in html
    assert html.count("data:image/png;base64,") == 2  # of the pair whose files are there
    assert "one: 12.3 dB, LPIPS 0.400" in html


def test_names_in_a_chart_keep_a_lines_height_apart() -> None:
    points = [Point(200 + i / 10, 15 + i / 100, f"model {i}", False) for i in range(12)]
    svg = chart("close", points)
    heights = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)">model', svg))
    assert len(heights) == 12
    assert min(np.diff(heights)) >= report._LINE - 1e-6
    assert heights[-1] < report._HEIGHT - report._BOTTOM


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [-1.0, 5e6], [0.0, 0.0]])
def test_axes_hold_any_values_and_have_round_ticks(values: list[float]) -> None:
    axis = report._Axis.of(values)
    assert axis.low < min(values) <= max(values) < axis.high
    assert 3 <= len(axis.ticks) <= 9
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


@pytest.mark.parametrize("content", ["[1]", "{", '{"protocol": "clean"}', '{"scores": {}}'])
def test_a_file_that_is_no_result_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=r"x.json is no result of bksdm-eval score or compare"):
        page([path])
    with pytest.raises(ReportError, match="cannot be read"):
        page([tmp_path / "gone.json"])


def test_the_command_writes_the_page_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = write(tmp_path, "small.json", SCORES)
    monkeypatch.setattr("sys.argv", ["bksdm-eval", "report", str(scores), "-o", str(tmp_path / "r.html")])
    cli.main()
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}\n"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    monkeypatch.setattr("sys.argv", ["bksdm-eval", "report", str(tmp_path / "gone"), "-o", str(tmp_path / "x.html")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert not (tmp_path / "x.html").exists()
