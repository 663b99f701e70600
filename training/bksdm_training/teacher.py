"""The demo teacher, top to bottom: pictures -> autoencoder -> denoiser -> a diffusers checkpoint with its charts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from bksdm import checkpoint, digests, image_folder, licence
from bksdm.checkpoint import Checkpoint
from bksdm.licence import Licence
from bksdm_training import checkpointing, progress, records
from bksdm_training.charts import save_curve, save_grid
from bksdm_training.config import TeacherConfig
from bksdm_training.data import DataError, Pictures, read_folder
from bksdm_training.denoiser import SCHEDULER_CONFIG, Denoiser, draw, train_denoiser
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

    init: a checkpoint to begin from; its autoencoder is kept as it is, and its licence goes on beside the pictures'.
    Goes on from what `output` holds of an earlier run with the same settings, pictures and starting weights.
    Raises DataError, ResumeError (anything else), DivergedError, PackageError, CheckpointError."""
    about, terms = _describe(data)
    pictures, unseen = read_folder(data / "train", config.size), read_folder(data / "unseen", config.size)
    begin = checkpoint.load(init) if init else None
    files = _files(data, {"train": pictures, "unseen": unseen}, terms)
    start = None if begin is None else _weights(begin)
    _same_run(config, {"data": about, "files": files, "init": start}, output)
    tokenizer = checkpoint.tokenizer()
    accelerator = Accelerator(cpu=device.type == "cpu")

    vae = move(begin.vae, device) if begin else train_vae(pictures, config, output / "vae", accelerator)
    shown = _spread([texts[0] for texts in pictures.captions], SHOWN)
    model = train_denoiser(pictures, vae, tokenizer, config, output / "unet", accelerator, shown, begin)

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
            licence=terms if begin is None else licence.joined(begin.licence, terms),
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
        "files": files,
        "pictures": {"train": len(pictures), "unseen": len(unseen)},
        "init": None if init is None else {"name": Path(init).name, **(start or {})},
        "vae_psnr_db": {"train": psnr(vae, pictures, device), "unseen": psnr(vae, unseen, device)},
        "scaling_factor": vae.config["scaling_factor"],
        "seconds": {stage: _seconds(output / stage) for stage in ("vae", "unet")},
        **records.machine(device, "transformers", "numpy"),
    }
    records.write_json(output / "training.json", facts)
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
        pictures = draw(model, vae, tokenizer, captions, guidance)
        save_grid(pictures, output / f"samples-{split}.png", columns=8, captions=captions)
    for stage in ("vae", "unet"):
        if rows := progress.read_log(output / stage):
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
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{data} has no LICENSE in plain text to hand on with the weights: put the notices of its pictures there, "
            "or make a folder with bksdm-train data -o DIR"
        ) from error
    path = data / "dataset.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        names = sorted({source["licence"].split(",")[0] for source in about.get("sources", ())})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it or make the folder again") from error
    return about, Licence(" and ".join(names) or licence.UNNAMED, notice)


def _files(data: Path, splits: Mapping[str, Pictures], terms: Licence) -> dict[str, str]:
    """SHA-256 of each split with its pictures, and of the licence. Raises DataError."""
    try:
        found = {split: image_folder.digest(data / split, pictures.names) for split, pictures in splits.items()}
    except OSError as error:
        raise DataError(f"{data} changed while it was read ({error}): run the command again") from error
    return {**found, "LICENSE": hashlib.sha256(terms.notice.encode()).hexdigest()}


def _weights(begin: Checkpoint) -> dict[str, object]:
    """What tells one starting point from another: SHA-256 of each part, and the scale of the latents."""
    return {**digests.of_parts(begin), "scaling_factor": begin.vae.config["scaling_factor"]}


def _same_run(config: TeacherConfig, made_on: Mapping[str, object], output: Path) -> None:
    """Refuse to go on with other settings, pictures or starting weights. Raises ResumeError."""
    settings = asdict(config)
    for stage in ("vae", "unet"):
        del settings[stage]["steps"]  # a run may be prolonged
    said = {
        "settings": "settings",
        "data": "data",
        "files": "pictures, captions or LICENSE",
        "init": "--init weights",
    }
    records.same_run(output, {"settings": settings, **made_on}, said)


def _seconds(folder: Path) -> int:
    state = checkpointing.load_newest(folder)
    return round(float(str(state.facts.get("seconds", 0)))) if state else 0
