"""bksdm-eval as a user meets it; the drawing and the network stand in, the way between them is real."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm import checkpoint
from bksdm.image_folder import digest
from bksdm_evaluation import cli, features, generate, grid
from bksdm_evaluation.retrieval import ScoreError
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import resolve_backend


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


def test_a_folder_as_output_is_refused_before_the_work(run, data, tmp_path):
    """It was noticed only when 200 pictures had been drawn."""
    code, _, err = run("retrieval", "--data", data, "-o", tmp_path)
    assert code == 2
    assert "is a folder" in err


@pytest.fixture
def stand_ins(monkeypatch):
    def draw(pipeline, captions, **_):
        return [Image.new("RGB", (8, 8), (60 * int(caption[-1]), 0, 0)) for caption in captions]

    def by_colour(network, pictures):
        rows = np.array([[1.0, np.asarray(p)[0, 0, 0] / 60] for p in pictures], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(generate, "generate", draw)
    monkeypatch.setattr(features, "load_network", lambda: None)
    monkeypatch.setattr(features, "features", by_colour)


@pytest.mark.usefixtures("stand_ins")
def test_figures_are_printed_and_written_with_what_repeats_them(run, data, tmp_path):
    code, out, _ = run("retrieval", "--data", data, "--threads", "1", "-o", tmp_path / "figures.json")
    assert (code, out) == (0, "top-1 100.0%, top-5 100.0% of 4 captions among 4 pictures\n")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["top1"] == 1.0
    assert figures["dataset"] == digest(data, [f"{i}.png" for i in range(4)])
    assert figures["bundle"] == bundles.load(bundles.demo(), verify=False).sha256
    assert (figures["backend"], figures["threads"], figures["batch_size"]) == (resolve_backend("auto"), 1, 8)
    assert figures["versions"]["numpy"] == np.__version__
    assert {path.name for path in tmp_path.iterdir()} == {"train", "figures.json"}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("load_network", PermissionError(13, "Permission denied", "cache"), "Permission denied"),
        ("features", ScoreError("features are not finite"), "not finite"),
    ],
)
def test_a_failure_after_the_drawing_is_one_sentence(run, data, monkeypatch, name, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(features, name, fail)
    code, _, err = run("retrieval", "--data", data)
    assert code == 1
    assert err.startswith("bksdm-eval: ")
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("stand_ins")
def test_a_kill_while_the_figures_are_written_keeps_the_old_ones(run, data, tmp_path, monkeypatch):
    (tmp_path / "figures.json").write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("retrieval", "--data", data, "-o", tmp_path / "figures.json")
    assert (tmp_path / "figures.json").read_text() == "old"


@pytest.fixture
def mini_folder(mini_checkpoint, tmp_path):
    folder = tmp_path / "mini"
    checkpoint.save(mini_checkpoint, folder)
    return folder


@pytest.fixture
def splits(tmp_path):
    for name, count in (("train", 6), ("unseen", 4)):
        (tmp_path / "splits" / name).mkdir(parents=True)
        rows = []
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * i, 0, 90)).save(tmp_path / "splits" / name / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{name} {i}"}))
        (tmp_path / "splits" / name / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path / "splits"


@pytest.mark.usefixtures("no_packages")
def test_a_student_is_scored_on_both_splits(run, mini_folder, splits, tmp_path):
    arguments = ["student", mini_folder, "--teacher", mini_folder, "--data", splits, "--steps", 1, "--count", 5]
    arguments += ["--teacher-cache", tmp_path / "cache", "-o", tmp_path / "s.json", "--grid", tmp_path / "grid.png"]
    code, out, err = run(*arguments)
    assert (code, len(out.splitlines())) == (0, 2), err
    assert out.startswith("train: KID ")
    assert "LPIPS to the teacher 0.000" in out
    assert "(4 captions, 4 pictures)" in out.splitlines()[1]
    figures = json.loads((tmp_path / "s.json").read_text())
    assert (figures["splits"]["train"]["generated"], figures["splits"]["train"]["dataset_pictures"]) == (5, 6)
    assert figures["splits"]["unseen"]["generated"] == 4
    assert figures["settings"]["guidance_scale"] == 7.5
    assert figures["student"]["sha256"] == figures["teacher"]["sha256"]
    assert set(figures["networks"]) == {"inception", "nearness", "lpips"}
    assert {"torch", "diffusers", "transformers"} < figures["versions"].keys()
    assert "rank-deficient" in figures["note"]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (5 * 68 + 4, 2 * (2 * 68 + 14) + 4)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4


@pytest.mark.usefixtures("no_packages")
def test_a_trained_unet_is_laid_over_and_one_split_scored(run, mini_folder, build_mini, splits, tmp_path):
    checkpoint.save(build_mini(seed=1), tmp_path / "other")
    code, out, err = run(
        "student", mini_folder, "--unet", tmp_path / "other" / "unet", "--teacher", mini_folder, "--data", splits,
        "--only", "unseen", "--steps", 1, "-o", tmp_path / "s.json",
    )  # fmt: skip
    assert (code, len(out.splitlines())) == (0, 1), err
    figures = json.loads((tmp_path / "s.json").read_text())
    assert list(figures["splits"]) == ["unseen"]
    assert figures["student"]["sha256"]["unet"] != figures["teacher"]["sha256"]["unet"]
    assert figures["student"]["sha256"]["vae"] == figures["teacher"]["sha256"]["vae"]
    assert figures["splits"]["unseen"]["lpips_to_teacher"]["mean"] > 0


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"checkpoint": "gone"}, 1, "there is no gone"),
        ({"--teacher": "gone"}, 1, "there is no gone"),
        ({"--data": "gone"}, 1, "make one with bksdm-train data"),
        ({"-o": "gone/s.json"}, 2, "is not a folder"),
        ({"--grid": "gone/g.png"}, 2, "--grid"),
        ({"--guidance-scale": "0.5"}, 2, "0.5"),
        ({"--count": "2"}, 2, "2"),
        ({"--device": "cuda:99"}, 2, "take cpu"),
        ({"--device": "warp"}, 2, "take cpu"),
    ],
)
def test_what_a_student_cannot_be_scored_with_is_said_before_the_work(
    run, mini_folder, splits, tmp_path, monkeypatch, change, code, said
):
    monkeypatch.chdir(tmp_path)
    given = {"--teacher": mini_folder, "--data": splits, "-o": tmp_path / "s.json", **change}
    first = given.pop("checkpoint", mini_folder)
    found, _, err = run("student", first, *(part for pair in given.items() for part in pair))
    assert found == code
    assert said in err
    assert "Traceback" not in err
    if code == 1:
        assert err.startswith("bksdm-eval: ")
        assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("no_packages")
def test_a_grid_that_cannot_be_saved_costs_no_figures(run, mini_folder, splits, tmp_path, monkeypatch):
    def full(bands, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(grid, "save_grid", full)
    arguments = ["student", mini_folder, "--teacher", mini_folder, "--data", splits, "--only", "unseen", "--steps", 1]
    code, _, err = run(*arguments, "-o", tmp_path / "s.json", "--grid", tmp_path / "grid.png")
    assert code == 1
    assert "bksdm-eval: [Errno 28] No space left on device" in err
    assert json.loads((tmp_path / "s.json").read_text())["splits"]["unseen"]["generated"] == 4
