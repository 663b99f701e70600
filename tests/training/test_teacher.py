"""The whole of the teacher's training at a tiny size, killed and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bksdm import checkpoint
from bksdm_training import progress, teacher, vae
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import LoopConfig, with_changes
from bksdm_training.data import DataError
from bksdm_training.teacher import train_teacher


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "run")


def test_training_ends_in_a_checkpoint_with_its_charts(trained):
    loaded = checkpoint.load(str(trained / "checkpoint"))
    assert loaded.image_size == 64
    assert "public domain" in loaded.licence.notice
    for name in ("samples-train.png", "samples-unseen.png", "loss-vae.png", "loss-unet.png"):
        with Image.open(trained / name) as picture:
            assert picture.size[0] > 100, name
    facts = json.loads((trained / "training.json").read_text())
    assert facts["pictures"] == {"train": 12, "unseen": 3}
    assert facts["config"]["size"] == 64
    assert facts["vae_psnr_db"]["train"] > 0


def test_other_settings_in_the_same_folder_are_refused(run, mini_data, mini_config):
    with pytest.raises(ResumeError, match="begun with other settings"):
        train_teacher(replace(mini_config, crop=16), mini_data, run, torch.device("cpu"))


def _recaption(data):
    listing = data / "train" / "metadata.jsonl"
    listing.write_text(listing.read_text().replace("disc 3", "ring 3"))


def _repaint(data):
    Image.new("RGB", (64, 64), "red").save(data / "unseen" / "1.png")


def _relicense(data):
    (data / "LICENSE").write_text("Discs: all rights reserved.\n")


@pytest.mark.parametrize("change", [_recaption, _repaint, _relicense])
def test_other_pictures_captions_or_licence_are_refused(tmp_path, mini_data, mini_config, monkeypatch, change):
    monkeypatch.setattr(teacher, "train_vae", lambda *_: 1 / 0)  # config.json is all that this needs
    data = shutil.copytree(mini_data, tmp_path / "data")
    with pytest.raises(ZeroDivisionError):
        train_teacher(mini_config, data, tmp_path / "run", torch.device("cpu"))
    change(data)
    with pytest.raises(ResumeError, match="begun with other pictures, captions or LICENSE"):
        train_teacher(mini_config, data, tmp_path / "run", torch.device("cpu"))


def test_other_starting_weights_are_refused_before_anything_is_trained(
    tmp_path, mini_data, mini_config, trained, monkeypatch
):
    """After a kill, forgetting --init trained a whole new autoencoder first."""
    monkeypatch.setattr(teacher, "train_denoiser", lambda *_: 1 / 0)
    first = shutil.copytree(trained / "checkpoint", tmp_path / "first")
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train_teacher(mini_config, mini_data, run, torch.device("cpu"), init=str(first))
    other = shutil.copytree(first, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    for init in (None, str(other)):
        with pytest.raises(ResumeError, match="begun with other --init weights"):
            train_teacher(mini_config, mini_data, run, torch.device("cpu"), init=init)
    assert not (run / "vae").exists()
    moved = first.rename(tmp_path / "moved")  # the same weights elsewhere are the same weights
    with pytest.raises(ZeroDivisionError):
        train_teacher(mini_config, mini_data, run, torch.device("cpu"), init=str(moved))


def test_fewer_steps_than_were_trained_leave_the_record_as_it_was(run, mini_data, mini_config):
    record = (run / "training.json").read_bytes()
    with pytest.raises(ResumeError, match="is at step 6 already"):
        train_teacher(with_changes(mini_config, None, 1), mini_data, run, torch.device("cpu"))
    assert (run / "training.json").read_bytes() == record


def test_a_folder_that_cannot_be_read_leaves_no_run_behind(tmp_path, mini_data, mini_config):
    data = shutil.copytree(mini_data, tmp_path / "data")
    (data / "train" / "3.png").write_bytes(b"cut")
    with pytest.raises(DataError, match="line 4"):
        train_teacher(mini_config, data, tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()


def test_a_finished_autoencoder_needs_no_lpips(run, mini_data, mini_config, monkeypatch):
    """LPIPS comes from a package registry: without a network even a finished autoencoder could not be gone on from."""
    monkeypatch.setattr(vae, "Lpips", lambda: 1 / 0)
    train_teacher(with_changes(mini_config, None, 7), mini_data, run, torch.device("cpu"))


@pytest.mark.usefixtures("no_lpips")
def test_a_denoiser_is_not_joined_to_an_autoencoder_it_was_not_trained_on(run, mini_data, mini_config):
    with pytest.raises(ResumeError, match="unet was trained with another made_on"):
        train_teacher(with_changes(mini_config, 8, None), mini_data, run, torch.device("cpu"))


def test_training_goes_on_from_a_checkpoint_with_its_autoencoder_untouched(tmp_path, mini_data, mini_config, run):
    first = run / "checkpoint"
    (first / "LICENSE").write_text("Squares: ask Ada.\n")
    record = json.loads((first / "bksdm.json").read_text())
    (first / "bksdm.json").write_text(json.dumps({**record, "licence": "Ada's"}))
    config = replace(mini_config, unet=replace(mini_config.unet, learning_rate=1e-9))  # so small that nothing moves
    second = train_teacher(
        config, mini_data, tmp_path / "second", torch.device("cpu"), init=str(first), dtype=torch.float32
    )
    assert not (tmp_path / "second" / "vae").exists()
    before, after = checkpoint.load(str(first)), checkpoint.load(str(second))
    for part in ("vae", "unet", "text_encoder"):
        weights = getattr(after, part).state_dict()
        for key, value in getattr(before, part).state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=2e-7)  # measured 3.4e-8
    # The weights it began with were trained on pictures too: their licence goes on with them.
    assert after.licence.name == "Ada's and see the notice"
    assert "Squares: ask Ada." in after.licence.notice
    assert "public domain" in after.licence.notice
    facts = json.loads((tmp_path / "second" / "training.json").read_text())
    assert (facts["init"]["name"], len(facts["init"]["unet"])) == ("checkpoint", 64)
    assert str(tmp_path) not in json.dumps(facts)


def test_a_checkpoint_of_quite_other_widths_is_refused(tmp_path, run, mini_data, mini_config):
    config = replace(mini_config, unet_channels=(16, 32, 64, 64))
    with pytest.raises(ResumeError, match=r"only .* of the U-Net's .* tensors have the shapes"):
        train_teacher(config, mini_data, tmp_path / "second", torch.device("cpu"), init=str(run / "checkpoint"))


def test_data_without_a_licence_is_refused_before_anything_is_trained(tmp_path, mini_data, mini_config):
    shutil.copytree(mini_data, tmp_path / "data", ignore=lambda *_: ["LICENSE"])
    with pytest.raises(DataError, match="has no LICENSE"):
        train_teacher(mini_config, tmp_path / "data", tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()


def test_a_licence_that_is_no_text_is_refused(tmp_path, mini_data, mini_config):
    shutil.copytree(mini_data, tmp_path / "data")
    (tmp_path / "data" / "LICENSE").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="has no LICENSE"):
        train_teacher(mini_config, tmp_path / "data", tmp_path / "run", torch.device("cpu"))


@pytest.mark.parametrize("content", ["{", '{"sources": [1]}', "[]"])
def test_a_damaged_dataset_description_is_one_sentence(tmp_path, mini_data, mini_config, content):
    shutil.copytree(mini_data, tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset.json is damaged"):
        train_teacher(mini_config, tmp_path / "data", tmp_path / "run", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.usefixtures("no_lpips")
def test_training_on_cuda_in_bf16_ends_in_a_checkpoint_and_goes_on(tmp_path, mini_data, mini_config):
    config = replace(mini_config, vae=replace(mini_config.vae, bf16=True), unet=replace(mini_config.unet, bf16=True))
    for steps in (6, 8):
        folder = train_teacher(with_changes(config, None, steps), mini_data, tmp_path, torch.device("cuda"))
        assert [row["step"] for row in progress.read_log(tmp_path / "unet")] == list(range(1, steps + 1))
    for part in (checkpoint.load(str(folder)).unet, checkpoint.load(str(folder)).text_encoder):
        assert all(torch.isfinite(tensor).all() for tensor in part.state_dict().values())
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["device"] == torch.cuda.get_device_name()
    assert facts["vae_psnr_db"]["train"] > 0


_PROGRAM = """
import sys
sys.path[:0] = {path!r}
import torch
from pathlib import Path
torch.set_num_threads(1)
from bksdm_training import vae
from bksdm_training.config import TeacherConfig, LoopConfig
from bksdm_training.teacher import train_teacher
class Nothing(torch.nn.Module):
    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3))
vae.Lpips = Nothing
config = {config!r}
train_teacher(config, Path({data!r}), Path({output!r}), torch.device("cpu"))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(tmp_path, mini_data, mini_config):
    steps = LoopConfig(steps=30, batch_size=4, learning_rate=1e-3, warmup=2, checkpoint_every=2)
    config = replace(mini_config, vae=steps, unet=steps)

    def start(output):
        program = _PROGRAM.format(path=sys.path, config=config, data=str(mini_data), output=str(output))
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, env=dict(os.environ))

    assert start(tmp_path / "whole").wait() == 0
    for stage, step in (("vae", 5), ("vae", 17), ("unet", 4), ("unet", 19)):
        log = tmp_path / "broken" / stage / "log.jsonl"
        process = start(tmp_path / "broken")
        while process.poll() is None and (not log.is_file() or log.read_bytes().count(b"\n") < step):
            time.sleep(0.01)
        assert process.poll() is None, f"the run ended before step {step} of {stage}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "broken").wait() == 0
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        whole, broken = (
            load_file(tmp_path / run / "checkpoint" / f"{part}.safetensors") for run in ("whole", "broken")
        )
        assert whole.keys() == broken.keys()
        for key in whole:
            assert torch.equal(whole[key], broken[key]), key
