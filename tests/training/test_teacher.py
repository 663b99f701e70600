"""The whole of the teacher's training at a tiny size, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bksdm import checkpoint
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import LoopConfig
from bksdm_training.teacher import train_teacher


@pytest.mark.usefixtures("no_lpips")
def test_training_ends_in_a_checkpoint_with_its_charts(tmp_path, mini_data, mini_config):
    folder = train_teacher(mini_config, mini_data, tmp_path / "run", torch.device("cpu"))
    loaded = checkpoint.load(str(folder))
    assert loaded.image_size == 64
    assert "public domain" in loaded.licence.notice
    for name in ("samples-train.png", "samples-unseen.png", "loss-vae.png", "loss-unet.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.size[0] > 100, name
    facts = json.loads((tmp_path / "run" / "training.json").read_text())
    assert facts["pictures"] == {"train": 12, "unseen": 3}
    assert facts["config"]["size"] == 64
    assert facts["vae_psnr_db"]["train"] > 0


@pytest.mark.usefixtures("no_lpips")
def test_other_settings_in_the_same_folder_are_refused(tmp_path, mini_data, mini_config):
    train_teacher(mini_config, mini_data, tmp_path, torch.device("cpu"))
    with pytest.raises(ResumeError, match="begun with other settings"):
        train_teacher(replace(mini_config, crop=16), mini_data, tmp_path, torch.device("cpu"))


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
    kills = 0
    for delay in (9.0, 10.0, 11.0, 12.5, 14.0):
        process = start(tmp_path / "broken")
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert start(tmp_path / "broken").wait() == 0
    assert kills, "every run ended before it could be killed"
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        whole, broken = (
            load_file(tmp_path / run / "checkpoint" / f"{part}.safetensors") for run in ("whole", "broken")
        )
        assert whole.keys() == broken.keys()
        for key in whole:
            assert torch.equal(whole[key], broken[key]), key
