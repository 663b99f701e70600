"""The demo teacher, top to bottom: pictures -> autoencoder -> denoiser -> a diffusers checkpoint with its charts."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from bksdm import checkpoint
from bksdm.licence import Licence
from bksdm_training import checkpointing, loop
from bksdm_training.charts import save_curve, save_grid
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import TeacherConfig
from bksdm_training.data import DataError, read_folder
from bksdm_training.denoiser import SCHEDULER_CONFIG, Denoiser, sample, train_denoiser
from bksdm_training.vae import move, psnr, train_vae

SHOWN = 32  # captions in a sample grid


def train_teacher(
    config: TeacherConfig,
    data: Path,
    output: Path,
    device: torch.device,
    *,
    init: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Train the demo teacher on an image folder with `train` and `unseen` splits; returns the checkpoint's folder.

    init: a checkpoint to begin from; its autoencoder is kept as it is. Goes on from what `output` holds of an
    earlier run with the same settings and data.
    Raises DataError, ResumeError (other settings), DivergedError, PackageError, CheckpointError."""
    about, licence = _describe(data)
    _same_run(config, about, output)
    pictures, unseen = read_folder(data / "train", config.size), read_folder(data / "unseen", config.size)
    tokenizer = checkpoint.tokenizer()

    begin = checkpoint.load(init) if init else None
    vae = move(begin.vae, device) if begin else train_vae(pictures, config, output / "vae", device)
    shown = _spread([texts[0] for texts in pictures.captions], SHOWN)
    model = train_denoiser(pictures, vae, tokenizer, config, output / "unet", device, shown, begin)

    folder = output / "checkpoint"
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
            guidance_scale=config.guidance_scale,
        ),
        folder,
        dtype=dtype,
    )
    model, vae = model.to(device), move(vae, device)  # saving needed them on the CPU
    grids = {"train": shown, "unseen": _spread([texts[0] for texts in unseen.captions], SHOWN)}
    _draw(output, model, vae, tokenizer, grids, device, config.guidance_scale)
    facts = {
        "config": asdict(config),
        "data": about,
        "pictures": {"train": len(pictures), "unseen": len(unseen)},
        "vae_psnr_db": {"train": psnr(vae, pictures, device), "unseen": psnr(vae, unseen, device)},
        "scaling_factor": vae.config["scaling_factor"],
        "init": None if begin is None else begin.source,
        "seconds": {stage: _seconds(output / stage) for stage in ("vae", "unet")},
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
    guidance: float,
) -> None:
    for split, captions in grids.items():
        pictures = sample(model, vae, tokenizer, captions, device=device, guidance=guidance)
        save_grid(pictures, output / f"samples-{split}.png", columns=8, captions=captions)
    for stage in ("vae", "unet"):
        if rows := loop.read_log(output / stage):
            save_curve(rows, output / f"loss-{stage}.png", title=f"demo teacher: {stage}")


def _spread(items: list[str], count: int) -> list[str]:
    return items[:: max(1, len(items) // count)][:count]


def _describe(data: Path) -> tuple[object, Licence]:
    """What a dataset says of itself, and the licence that goes with weights trained on it. Raises DataError."""
    for split in ("train", "unseen"):
        if not (data / split / "metadata.jsonl").is_file():
            raise DataError(f"{data} has no {split}/metadata.jsonl: make one with bksdm-train data -o DIR")
    try:
        notice = (data / "LICENSE").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{data} has no LICENSE to hand on with the weights: put the notices of its pictures there, "
            "or make a folder with bksdm-train data -o DIR"
        ) from error
    path = data / "dataset.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        names = sorted({source["licence"].split(",")[0] for source in about.get("sources", ())})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it or make the folder again") from error
    return about, Licence(" and ".join(names) or "see the notice", notice)


def _same_run(config: TeacherConfig, about: object, output: Path) -> None:
    """Refuse to go on with other settings or data; only run lengths may change. Raises ResumeError."""
    path = output / "config.json"
    now = json.loads(json.dumps({"config": asdict(config), "data": about}))
    if path.is_file():
        try:
            then = json.loads(path.read_text())
            for stage in ("vae", "unet"):
                then["config"][stage]["steps"] = now["config"][stage]["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged ({error}): choose another --output") from error
        if then != now:
            raise ResumeError(f"{output} was begun with other settings or data: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}")
    staging.write_text(json.dumps(now, indent=2) + "\n")
    staging.replace(path)


def _seconds(folder: Path) -> int:
    state = checkpointing.load_newest(folder)
    return round(float(str(state.facts["seconds"]))) if state else 0
