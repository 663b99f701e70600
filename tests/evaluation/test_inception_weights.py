"""The published Inception from pytorch-fid's file: against the packaged network, and as commands take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm_evaluation import cli, inception
from bksdm_evaluation.inception_weights import InceptionV3, load, logits, resized_as_tensorflow
from bksdm_evaluation.retrieval import ScoreError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of pytorch-fid's layout with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(InceptionV3().state_dict(), path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    pair = tmp_path / "a", tmp_path / "b"
    for folder in pair:
        folder.mkdir()
        for number in range(12):
            colours = random.integers(0, 256, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(colours).resize((32, 32)).save(folder / f"{number:03d}.png")
    return pair


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["bksdm-eval", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_pixels_are_where_tensorflow_had_them() -> None:
    """Pixel i of the result lies at i * size / 299 of the picture: of a ramp it is that, up to the last pixel."""
    height, width = 40, 52
    rows = torch.arange(height).repeat(width, 1).T
    columns = torch.arange(width).repeat(height, 1)
    picture = torch.stack([rows, columns, 2 * rows + columns]).to(torch.uint8)[None]
    found = resized_as_tensorflow(picture)[0].numpy()
    down = np.minimum(np.arange(299) * height / 299, height - 1)[:, None].repeat(299, 1)
    across = np.minimum(np.arange(299) * width / 299, width - 1)[None].repeat(299, 0)
    np.testing.assert_allclose(found, [down, across, 2 * down + across], rtol=0, atol=2e-5)  # measured 1.4e-5


def test_a_file_scores_what_it_did_before_it_was_saved(file: Path) -> None:
    torch.manual_seed(0)
    original = InceptionV3().eval()
    loaded = load(file)
    pictures = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 40)).astype(np.uint8)
    with torch.no_grad():
        x = (resized_as_tensorflow(torch.from_numpy(pictures)) - 128) / 128
        expected = original.fc(original(x)) - original.fc.bias
    np.testing.assert_allclose(logits(loaded, pictures), expected.numpy(), rtol=0, atol=1e-6)
    assert len(loaded.sha256) == 64


@pytest.mark.parametrize("content", [b"", b".", b"junk", "other", "list"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"conv.weight": torch.zeros(2)} if content == "other" else [1, 2], path)
    with pytest.raises(ScoreError, match=f"^{path} (cannot be read as weights|holds no weights of pytorch-fid's)"):
        load(path)


def test_scores_and_a_comparison_by_it(
    file: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    a, b = folders
    words = ["--inception", file, "--size", 32]
    assert run(monkeypatch, "statistics", b, *words, "-o", tmp_path / "real.npz") == 0
    reference = ["--reference", tmp_path / "real.npz"]
    assert run(monkeypatch, "score", a, *words, *reference, "--metrics", "kid,is", "-o", tmp_path / "s.json") == 0
    assert "(biased: too few pictures) (not by the published weights)" in capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["network"] == load(file).sha256
    assert set(found["scores"]) == {"kid", "inception_score"}
    # Statistics of one network are not compared with pictures through another.
    assert run(monkeypatch, "compare", a, a, "--inception-score", *words, "-o", tmp_path / "c.json") == 0
    verdict = json.loads((tmp_path / "c.json").read_text())
    asked = {one["what"]: one["passed"] for one in verdict["questions"]}
    assert asked["difference of inception score"] is None  # of so few it tells nothing
    assert verdict["scores"]["inception score"]["value"] == 0
    assert verdict["classes_network"] == load(file).sha256
    told = capsys.readouterr().out
    assert "12 pairs are too few to tell: difference of inception score" in told
    with torch.no_grad():
        other = load(file)
        other.fc.weight.add_(1)
        torch.save(other.state_dict(), tmp_path / "other.pth")
    assert run(monkeypatch, "score", a, "--inception", tmp_path / "other.pth", "--size", 32, *reference) == 1
    assert "the reference was prepared otherwise (network is " in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_refused(file: Path, tmp_path: Path) -> None:
    network = load(file)
    network.fc.bias[3] = float("nan")
    torch.save(network.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(ScoreError, match=r"holds NaN or infinity, in fc\.bias first"):
        load(tmp_path / "nan.pth")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["compare", "a", "b"], "--inception is of --reference and of --inception-score, and neither is asked"),
        (["score", "a", "--metrics", "clip"], "--inception is of fid, kid and is, and asked is clip"),
        (["score", "a", "--metrics", "is", "--reference", "b"], "--reference is of fid and kid, and asked is is"),
    ],
)
def test_options_without_use_are_misuse(
    command: list[str], why: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, *command, "--inception", file) == 2
    assert why in capsys.readouterr().err


def test_logits_are_torch_fidelitys(file: Path) -> None:
    """Where it is installed; its import needs torchvision. Once with a stand-in for that: 8e-7 of values to 0.96."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=(ImportError, RuntimeError))
    network = fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["logits_unbiased"], feature_extractor_weights_path=str(file)
    ).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)
    with torch.no_grad():
        (expected,) = network(torch.from_numpy(pictures))
    np.testing.assert_allclose(logits(load(file), pictures), expected.numpy(), rtol=0, atol=1e-5)


def test_ten_splits_need_ten_pictures(
    file: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for path in sorted(folders[0].iterdir())[9:]:
        path.unlink()
    assert run(monkeypatch, "score", folders[0], "--inception", file, "--size", 32, "--metrics", "is") == 1
    assert "a mean over 10 splits, found 9 pictures" in capsys.readouterr().err


@pytest.mark.slow
def test_the_packaged_weights_give_the_packaged_networks_features() -> None:
    """By order of use the two hold the same tensors; so what is computed from them is the same network."""
    packaged = inception.load_network()
    network = InceptionV3()
    theirs = iter(packaged.state_dict().values())
    state: dict[str, torch.Tensor] = {}
    for name, value in network.state_dict().items():
        if name.endswith(("bn.weight", "num_batches_tracked")) or name.startswith("fc."):
            state[name] = value  # a scale of 1; what nobody reads; the class head, which the package lacks
        else:
            state[name] = next(theirs)
            assert state[name].shape == value.shape, name
    assert next(theirs, None) is None
    network.load_state_dict(state)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64)).astype(np.uint8)
    found, expected = (inception.features(one.eval(), pictures) for one in (network, packaged))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # measured 1e-6, of values to 3.7
