import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm import checkpoint, digests
from bksdm.unet import count_macs, count_params
from bksdm_evaluation import devices, student, torch_pipeline
from bksdm_evaluation.retrieval import ScoreError
from bksdm_evaluation.student import (
    NOTE,
    Drawing,
    check_pair,
    describe,
    load_networks,
    perceptual_distances,
    read_split,
    score,
)

DRAWING = Drawing(steps=2, guidance_scale=2.0, seed=3, batch_size=2)


@contextmanager
def silent(what, total):
    yield lambda done: None


@pytest.fixture
def data(tmp_path):
    for name, count in (("train", 8), ("unseen", 5)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        rows = []
        for i in range(count):
            Image.new("RGB", (16, 16), (30 * i, 90, 200 - 20 * i)).save(folder / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{name} {i}"}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path / "data"


@pytest.fixture
def drawn(monkeypatch):
    """The models that were asked to draw, in order; their pictures are flat, a colour per model and caption."""
    sources = []

    def recorded(model, captions, **_):
        sources.append(model.source)
        level = 40 * int(model.source[len("mini(seed=")])
        return [Image.new("RGB", (64, 64), (level, 20 * i, 90)) for i in range(len(captions))]

    monkeypatch.setattr(torch_pipeline, "generate", recorded)
    return sources


@pytest.mark.usefixtures("no_packages")
def test_the_teacher_as_its_own_student_is_at_distance_zero(mini_checkpoint, data):
    split = read_split(data, "train", 64, 6)
    found = score(mini_checkpoint, mini_checkpoint, split, DRAWING, load_networks(), silent)
    assert (len(found.student), len(split.dataset.pictures)) == (6, 8)
    np.testing.assert_array_equal(found.lpips, np.zeros(6))
    figures = found.figures()
    assert (figures["generated"], figures["dataset_pictures"]) == (6, 8)
    assert figures["lpips_to_teacher"]["mean"] == 0
    assert figures["kid"]["value"] == found.kid.value
    assert figures["dataset"] == split.dataset.sha256
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.usefixtures("no_packages")
def test_a_student_with_the_datasets_own_pictures_scores_best(mini_checkpoint, data, monkeypatch):
    split = read_split(data, "train", 64, None)
    networks = load_networks()
    drawing = score(mini_checkpoint, mini_checkpoint, split, DRAWING, networks, silent)
    monkeypatch.setattr(torch_pipeline, "generate", lambda *_, **__: list(split.dataset.pictures))
    perfect = score(mini_checkpoint, mini_checkpoint, split, DRAWING, networks, silent)
    assert abs(perfect.fid) < 1e-6 < drawing.fid
    assert perfect.kid.value < drawing.kid.value
    assert (perfect.top1, perfect.top5) == (1.0, 1.0)


@pytest.mark.usefixtures("no_packages")
def test_the_teacher_is_drawn_once_for_all_its_students(mini_checkpoint, build_mini, data, tmp_path, drawn):
    other = build_mini(seed=1)
    split = read_split(data, "unseen", 64, None)

    def run(teacher=mini_checkpoint, drawing=DRAWING, split=split):
        drawn.clear()
        found = score(other, teacher, split, drawing, load_networks(), silent, tmp_path / "cache")
        return found, list(drawn)

    first, sources = run()
    assert sources == ["mini(seed=0)", "mini(seed=1)"]
    again, sources = run(drawing=replace(DRAWING, batch_size=5))
    assert sources == ["mini(seed=1)"]
    np.testing.assert_array_equal(again.lpips, first.lpips)
    assert first.lpips.min() > 0
    # whatever decides the teacher's pictures
    for change in (
        {"drawing": replace(DRAWING, seed=4)},
        {"drawing": replace(DRAWING, guidance_scale=3.0)},
        {"drawing": replace(DRAWING, steps=3)},
        {"split": replace(split, chosen=split.chosen[:4])},
        {"teacher": replace(mini_checkpoint, scheduler_config={**mini_checkpoint.scheduler_config, "beta_end": 0.02})},
    ):
        assert run(**change)[1] == ["mini(seed=0)", "mini(seed=1)"], change
    assert run(teacher=build_mini(seed=2))[1] == ["mini(seed=2)", "mini(seed=1)"]


def test_models_without_noise_in_common_are_refused(mini_checkpoint):
    check_pair(mini_checkpoint, mini_checkpoint)
    with pytest.raises(ScoreError, match=r"student draws 128 px from \[4, 16, 16\] latents, the teacher 64 px from"):
        check_pair(replace(mini_checkpoint, image_size=128), mini_checkpoint)
    small = replace(mini_checkpoint, image_size=16)
    with pytest.raises(ScoreError, match="draws 16 px: LPIPS needs at least 32"):
        check_pair(small, small)


def test_too_few_pictures_are_refused_before_any_is_drawn(data):
    lines = (data / "unseen" / "metadata.jsonl").read_text().splitlines()
    (data / "unseen" / "metadata.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(ScoreError, match="unseen: scores need at least 4 pictures, found 3"):
        read_split(data, "unseen", 64, None)


def test_a_model_is_described_by_what_it_costs_and_by_its_weights(mini_checkpoint, build_mini):
    found = describe(mini_checkpoint)
    config = mini_checkpoint.unet.config
    assert found["unet_params"] == count_params(config)
    assert found["unet_macs"] == count_macs(config, latent=8)
    assert found["sha256"] == digests.of_parts(build_mini()) != digests.of_parts(build_mini(seed=1))
    changed = build_mini()
    with torch.no_grad():
        changed.vae.decoder.conv_out.bias[0] += 1e-3
    differs = [name for name, value in digests.of_parts(changed).items() if value != found["sha256"][name]]
    assert differs == ["vae"]


def test_the_note_says_what_the_figures_are_worth():
    assert NOTE.startswith("KID first")
    assert "rank-deficient" in NOTE


def test_distances_are_pair_by_pair_whatever_the_batch(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 8, 8, 3)).astype(np.uint8)
    monkeypatch.setattr(student, "_LPIPS_BATCH", 2)

    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return (x - y).square().mean((1, 2, 3))

    found = perceptual_distances(Distance(), a, b)
    expected = ((a / 127.5 - b / 127.5) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # measured 2e-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.usefixtures("no_packages")
def test_cuda_has_the_scores_of_a_cpu(build_mini, data):
    split, found = read_split(data, "train", 64, 6), []
    for name in ("cpu", "cuda"):
        device = devices.pick(name)
        teacher, other = build_mini(seed=0), build_mini(seed=1)
        for model in (teacher, other):
            devices.move(model, device)
        found.append(score(other, teacher, split, DRAWING, load_networks(device), silent))
    np.testing.assert_allclose(found[1].lpips, found[0].lpips, rtol=0.02)  # not run yet
    assert abs(found[1].fid / found[0].fid - 1) < 0.02
    assert (found[1].top1, found[1].top5) == (found[0].top1, found[0].top5)


@pytest.mark.slow
def test_the_real_networks_tell_a_damaged_demo_from_the_demo(data):
    demo, damaged = checkpoint.load("demo"), checkpoint.load("demo")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in damaged.unet.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    split, networks = read_split(data, "train", 128, 4), load_networks()
    drawing = replace(DRAWING, steps=10)
    itself, other = (score(one, demo, split, drawing, networks, silent) for one in (demo, damaged))
    assert itself.lpips.max() == 0
    assert other.lpips.min() > 0.1  # measured 0.31
    assert other.fid > itself.fid  # measured 487 and 426
