"""The demo teacher, top to bottom: pictures -> autoencoder -> denoiser -> a diffusers checkpoint with its charts."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from bksdm import checkpoint
from bksdm.licence import Licence
from bksdm_training import loop
from bksdm_training.charts import save_curve, save_grid
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import TeacherConfig
from bksdm_training.data import read_folder
from bksdm_training.denoiser import SCHEDULER_CONFIG, Denoiser, sample, train_denoiser
from bksdm_training.vae import psnr, train_vae

SHOWN = 32  # captions in a sample grid


def train_teacher(
    config: TeacherConfig, data: Path, output: Path, device: torch.device, *, dtype: torch.dtype = torch.float16
) -> Path:
    """Train the demo teacher on an image folder with `train` and `unseen` splits; returns the checkpoint's folder.

    Goes on from what `output` holds of an earlier run with the same settings and data.
    Raises DataError, ResumeError (other settings), DivergedError, PackageError, CheckpointError."""
    _same_run(config, data, output)
    started = time.monotonic()
    pictures, unseen = read_folder(data / "train", config.size), read_folder(data / "unseen", config.size)
    tokenizer = checkpoint.tokenizer()

    vae = train_vae(pictures, config, output / "vae", device)
    shown = _spread([texts[0] for texts in pictures.captions], SHOWN)
    model = train_denoiser(pictures, vae, tokenizer, config, output / "unet", device, shown)

    folder = output / "checkpoint"
    licence = Licence("MIT and Apache-2.0 notices", (data / "LICENSE").read_text(encoding="utf-8"))
    checkpoint.save(
        checkpoint.Checkpoint(
            variant="custom",
            source="demo",
            text_encoder=model.text_encoder.eval().cpu(),
            unet=model.unet.eval().cpu(),
            vae=vae.eval().cpu(),
            tokenizer=tokenizer,
            scheduler_config=dict(SCHEDULER_CONFIG),
            licence=licence,
            image_size=config.size,
        ),
        folder,
        dtype=dtype,
    )
    for part in (model, vae):
        part.to(device)  # saving moved them to the CPU
    grids = {"train": shown, "unseen": _spread([texts[0] for texts in unseen.captions], SHOWN)}
    _draw(output, model, vae, tokenizer, grids, device)
    facts = {
        "config": asdict(config),
        "data": json.loads((data / "dataset.json").read_text()),
        "pictures": {"train": len(pictures), "unseen": len(unseen)},
        "vae_psnr_db": {"train": psnr(vae, pictures, device), "unseen": psnr(vae, unseen, device)},
        "scaling_factor": vae.config["scaling_factor"],
        "seconds_of_last_run": round(time.monotonic() - started),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def _draw(
    output: Path,
    model: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    grids: dict[str, list[str]],
    device: torch.device,
) -> None:
    for split, captions in grids.items():
        pictures = sample(model, vae, tokenizer, captions, device=device)
        save_grid(pictures, output / f"samples-{split}.png", columns=8, captions=captions)
    for stage in ("vae", "unet"):
        save_curve(loop.read_log(output / stage), output / f"loss-{stage}.png", title=f"demo teacher: {stage}")


def _spread(items: list[str], count: int) -> list[str]:
    return items[:: max(1, len(items) // count)][:count]


def _same_run(config: TeacherConfig, data: Path, output: Path) -> None:
    """Refuse to go on with other settings; only run lengths may change."""
    path = output / "config.json"
    dataset = data / "dataset.json"
    now = {"config": asdict(config), "data": json.loads(dataset.read_text()) if dataset.is_file() else None}
    if path.is_file():
        then = json.loads(path.read_text())
        for stage in ("vae", "unet"):
            then["config"][stage]["steps"] = now["config"][stage]["steps"]
        if then != json.loads(json.dumps(now)):
            raise ResumeError(f"{output} was begun with other settings or data: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n")
