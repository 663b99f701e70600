"""bksdm-eval generate, statistics and score as a user meets them; the networks stand in, the way between is real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_evaluation import cli
from bksdm_evaluation.statistics import kernel_distance

RANDOM = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("no_packages")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bksdm-eval", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def fill(folder: Path, count: int, *, size: tuple[int, int] = (32, 32), suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colours = RANDOM.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(colours).resize(size).save(folder / f"{i:03d}{suffix}")
    return folder


def lines(err: str) -> list[str]:
    """Of stderr, without a bar."""
    return [line for line in err.replace("\r", "\n").split("\n") if line.strip() and "picture" not in line[:60]]


def test_the_demo_is_drawn_scored_and_gone_on_with(run, tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("file_name,text\n" + "".join(f"{i}.jpg,a red apple {i}\n" for i in range(5)))
    draw = ["generate", "--captions", captions, "--steps", 2, "--size", 64, "--backend", "onnxruntime", "--threads", 1]
    for shard in ("0/2", "1/2"):
        code, out, _ = run(*draw, "--shard", shard, "-o", tmp_path / "drawn")
        assert code == 0
    assert out.splitlines()[0] == "2 pictures drawn, 0 were there; clean protocol, 64 px"
    code, out, _ = run(*draw, "-o", tmp_path / "drawn")
    assert out.startswith("0 pictures drawn, 5 were there")
    real = fill(tmp_path / "real", 9, size=(50, 40), suffix=".jpg")
    code, out, _ = run(
        *("score", tmp_path / "drawn", "--reference", real, "--size", 64, "-o", tmp_path / "scores.json")
    )
    assert code == 0
    assert ": clean protocol, 64 px, 5 pictures against 9" in out
    assert "left out, fid: there are 5 pictures, and FID of 64 or fewer is biased upwards" in out
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert figures["generation"]["steps"] == 2
    assert figures["protocol"] == "clean"
    assert set(figures["scores"]) == {"kid"}
    assert "torch" in figures["versions"]


def test_statistics_of_shards_score_as_the_folder_does(run, tmp_path: Path) -> None:
    real, drawn = fill(tmp_path / "real", 150, size=(40, 60)), fill(tmp_path / "drawn", 130)
    score = ["score", drawn, "--size", 32, "--metrics", "kid,fid"]
    results = []
    for shard in ("0/3", "1/3", "2/3"):
        place = tmp_path / f"real-{shard[0]}.npz"
        code, out, _ = run("statistics", real, "--size", 32, "--shard", shard, "-o", place)
        assert (code, out.splitlines()[0]) == (0, "50 pictures, clean protocol, 32 px")
    parts = [word for i in range(3) for word in ("--reference", tmp_path / f"real-{i}.npz")]
    for reference in (["--reference", real], parts):
        code, out, _ = run(*score, *reference, "-o", tmp_path / "scores.json")
        assert code == 0
        results.append(json.loads((tmp_path / "scores.json").read_text())["scores"])
    assert results[0]["fid"]["value"] == pytest.approx(results[1]["fid"]["value"], rel=1e-9)
    # A picture's features depend on its batch in the last bit: measured 7e-9.
    assert results[0]["kid"] == pytest.approx(results[1]["kid"], rel=1e-6)
    assert not results[0]["fid"]["biased"]


def test_what_is_scored_is_what_the_formulas_say(run, tmp_path: Path, no_packages: None) -> None:
    from bksdm_evaluation import inception

    real, drawn = fill(tmp_path / "real", 12), fill(tmp_path / "drawn", 10)
    run("score", drawn, "--reference", real, "--size", 32, "--protocol", "published", "-o", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())["scores"]["kid"]
    sets = []
    for folder in (drawn, real):
        pictures = [Image.open(path) for path in sorted(folder.iterdir())]
        if folder == real:  # a real picture passes a JPEG
            for number, one in enumerate(pictures):
                one.save(tmp_path / f"{number}.jpg")
            pictures = [Image.open(tmp_path / f"{number}.jpg") for number in range(len(pictures))]
        sets.append(inception.features(inception.load_network(), pictures).astype(np.float32).astype(np.float64))
    expected = kernel_distance(*sets)
    assert found["value"] == pytest.approx(expected.value, rel=1e-4)


def test_bad_input_is_counted_and_named(run, tmp_path: Path) -> None:
    real, drawn = fill(tmp_path / "real", 9), fill(tmp_path / "drawn", 6)
    (drawn / "002.png").write_bytes((drawn / "002.png").read_bytes()[:90])
    Image.new("RGB", (16, 32)).save(drawn / "004.png")
    code, out, err = run("score", drawn, "--reference", real, "--size", 32)
    assert (code, out) == (1, "")
    assert "bksdm-eval: 2 pictures cannot be scored: 002: " in err
    assert "004: 16x32 px, where 32x32 are scored" in err
    (drawn / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": "a"}\n{"file_name": "900.png", "text": "b"}'
    )
    code, _, err = run("score", drawn, "--reference", real, "--size", 32)
    assert "bksdm-eval: 1 caption without a picture: 900" in err
    assert code == 1


def test_fid_of_too_few_pictures_is_refused_unless_asked_for(run, tmp_path: Path) -> None:
    real, drawn = fill(tmp_path / "real", 9), fill(tmp_path / "drawn", 6)
    score = ["score", drawn, "--reference", real, "--size", 32, "--metrics", "fid"]
    code, _, err = run(*score)
    assert code == 1
    assert "there are 6 pictures, and FID of 64 or fewer is biased upwards: ask for kid, or say --allow-biased" in err
    code, out, _ = run(*score, "--allow-biased")
    assert code == 0
    assert "(biased: too few pictures)" in out


def test_protocols_are_not_mixed(run, tmp_path: Path) -> None:
    real, drawn = fill(tmp_path / "real", 9), fill(tmp_path / "drawn", 6)
    run("statistics", real, "--size", 32, "--protocol", "published", "-o", tmp_path / "real.npz")
    code, _, err = run("score", drawn, "--reference", tmp_path / "real.npz", "--size", 32)
    assert code == 1
    assert "the reference was prepared otherwise (protocol is published there, clean here)" in err
    said = {"protocol": "published", "size": 32, "steps": 3}
    (drawn / "generation.json").write_text(json.dumps(said))
    code, _, err = run("score", drawn, "--reference", real, "--size", 32, "--protocol", "clean")
    assert "was drawn with protocol published, not clean" in err
    other = fill(tmp_path / "other", 3)
    (other / "generation.json").write_text(json.dumps({**said, "steps": 4}))
    code, _, err = run("score", drawn, other, "--reference", real, "--size", 32)
    assert "are not shards of one job: steps is 3 there, 4 here" in err


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--metrics", "fid"], 2, "give --reference"),
        (["--metrics", "lpips"], 2, "'lpips' is no metric"),
        (["--metrics", "is"], 1, "the Inception score needs --inception FILE, pytorch-fid's weights"),
        (["--metrics", "clip", "--clip-model", "gone"], 1, "the CLIP network gone cannot be loaded"),
        (["-o", "gone/scores.json"], 2, "is not a folder"),
    ],
)
def test_misuse_is_one_sentence(
    run, tmp_path: Path, words: list[str], code: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked for the network's name, the Hub's client would try again for a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real, drawn = fill(tmp_path / "real", 9), fill(tmp_path / "drawn", 6)
    reference = [] if "--metrics" in words else ["--reference", real]
    found, out, err = run("score", drawn, *reference, "--size", 32, *words)
    assert (found, out) == (code, "")
    assert why in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("shard", "code", "said"), [("0/1", 0, "1 pictures drawn"), ("4/2", 1, "shard 4/2 is none")])
def test_a_bundle_is_drawn_without_torch(shard: str, code: int, said: str, tmp_path: Path) -> None:
    """Importing it and diffusers took longer than the demo's pictures. Nor is it needed to say what is wrong."""
    (tmp_path / "c.txt").write_text("a red apple\n")
    script = (
        "import sys; from bksdm_evaluation.cli import main\n"
        "try: main()\n"
        "finally: print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    words = ["generate", "--captions", "c.txt", "--steps", "1", "--backend", "onnxruntime", "--threads", "1", "-o", "o"]
    ended = subprocess.run(
        [sys.executable, "-c", script, *words, "--shard", shard],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    assert said in ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[-1] == ""


def test_generate_refuses_what_does_not_go_together(run, tmp_path: Path) -> None:
    captions = tmp_path / "c.txt"
    captions.write_text("a\n")
    base = ["generate", "--captions", captions, "-o", tmp_path / "out"]
    for words, why in (
        (["--checkpoint", "demo", "--sampler", "euler"], "is drawn by PyTorch, with pndm"),
        (["--unet", "x"], "is laid over a --checkpoint"),
    ):
        code, _, err = run(*base, *words)
        assert code == 2
        assert why in err
    code, _, err = run(*base, "--shard", "4/2")
    assert code == 1
    assert "shard 4/2 is none" in err
    assert not (tmp_path / "out").exists()
