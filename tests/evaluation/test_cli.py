"""bksdm-eval as a user meets it; the drawing and the network stand in, the way between them is real."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from bksdm_evaluation import cli, features, generate


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["bksdm-eval", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    rows = []
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"red {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_help_needs_no_extra(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "retrieval" in out


def test_diffusers_is_told_to_be_quiet_before_it_is_imported(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    run("retrieval", "--data", data, "-o", tmp_path / "gone" / "x.json")
    assert os.environ["DIFFUSERS_VERBOSITY"] == "info"
    monkeypatch.delenv("DIFFUSERS_VERBOSITY")
    run("retrieval", "--data", data, "-o", tmp_path / "gone" / "x.json")
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"


def test_no_bundle_is_one_sentence(run, data, tmp_path):
    code, _, err = run("retrieval", "--data", data, "--bundle", tmp_path / "gone")
    assert code == 1
    assert err.startswith("bksdm-eval: ")
    assert len(err.strip().splitlines()) == 1


def test_a_result_that_could_not_be_written_is_refused_before_the_work(run, data, tmp_path):
    code, _, err = run("retrieval", "--data", data, "-o", tmp_path / "gone" / "x.json")
    assert code == 2
    assert "is not a folder" in err


def test_figures_are_printed_and_written(run, data, tmp_path, monkeypatch):
    def draw(pipeline, captions, **_):
        return [Image.new("RGB", (8, 8), (60 * int(caption[-1]), 0, 0)) for caption in captions]

    def by_colour(network, pictures):
        rows = np.array([[1.0, np.asarray(p)[0, 0, 0] / 60] for p in pictures], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(generate, "generate", draw)
    monkeypatch.setattr(features, "load_network", lambda: None)
    monkeypatch.setattr(features, "features", by_colour)
    code, out, _ = run("retrieval", "--data", data, "-o", tmp_path / "figures.json")
    assert (code, out) == (0, "top-1 100.0%, top-5 100.0% of 4 captions among 4 pictures\n")
    assert json.loads((tmp_path / "figures.json").read_text())["top1"] == 1.0
