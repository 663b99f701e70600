"""A checkpoint as a folder in diffusers' layout: read with every tensor accounted for, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from bksdm import leftovers, vocabulary
from bksdm.components import (
    Components,
    load_diffusers_model,
    load_text_encoder,
    read_config,
    with_clip_prefix,
)
from bksdm.errors import CheckpointError

if TYPE_CHECKING:
    from bksdm.checkpoint import Checkpoint

INDEX = "model_index.json"
PARTS = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")
# What diffusers' layout has no place for: our variant, where the weights came from, the licence, the guidance scale.
RECORD = "bksdm.json"


def load(folder: Path, *, unet: UNet2DConditionModel | None = None, allow_pickle: bool = False) -> Components:
    """Every part of the checkpoint in `folder`. unet: taken instead of the folder's own. Raises CheckpointError."""
    if not (folder / INDEX).is_file():
        if unet_folder(folder):
            raise CheckpointError(
                f"{folder} holds a U-Net alone: name the whole model it belongs to, over which it can be laid"
            )
        raise CheckpointError(f"{folder} is not a diffusers checkpoint: it has no {INDEX}")
    index = read_config(folder / INDEX)
    others = sorted(key for key in ("text_encoder_2", "transformer", "prior", "controlnet") if key in index)
    if others:
        raise CheckpointError(
            f"{folder} is a {index.get('_class_name')} (it has {others[0]}), not a Stable Diffusion 1 or 2 model"
        )
    for part in PARTS:
        if not (folder / part).is_dir() and not (part == "unet" and unet):
            raise CheckpointError(f"{folder} is not whole: it has no {part}/")
    return Components(
        text_encoder=load_text_encoder(folder / "text_encoder", allow_pickle=allow_pickle),
        unet=unet or load_diffusers_model(UNet2DConditionModel, folder / "unet", allow_pickle=allow_pickle),
        vae=load_diffusers_model(AutoencoderKL, folder / "vae", allow_pickle=allow_pickle),
        tokenizer=vocabulary.load(folder / "tokenizer"),
        scheduler_config={
            key: value
            for key, value in read_config(folder / "scheduler" / "scheduler_config.json").items()
            if key != "_diffusers_version"
        },
    )


def load_unet(folder: Path, *, allow_pickle: bool = False) -> UNet2DConditionModel:
    """A trained U-Net: its own folder, or the unet/ of a whole checkpoint. Raises CheckpointError."""
    found = unet_folder(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no U-Net (config.json and weights, or a unet/ folder with them)")
    return load_diffusers_model(UNet2DConditionModel, found, allow_pickle=allow_pickle)


def unet_folder(folder: Path) -> Path | None:
    """Where in `folder` the U-Net's config.json lies, if anywhere."""
    return next((place for place in (folder, folder / "unet") if (place / "config.json").is_file()), None)


def record(folder: Path) -> dict[str, object]:
    """What save() wrote beside the weights: variant, source, licence, guidance_scale.

    Empty for a checkpoint of another's making."""
    return read_config(folder / RECORD) if (folder / RECORD).is_file() else {}


def save(checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `checkpoint` as `folder`; see bksdm.checkpoint.save."""
    folder = Path(folder).resolve()
    refuse_foreign(folder)
    replaced = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
    try:
        with leftovers.scratch(folder.parent, f"{folder.name}.partial-") as partial:
            _write(checkpoint, partial, dtype)
            # Two renames: a kill between them leaves the old checkpoint whole as .replaced, never a mixture.
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
    except (OSError, SafetensorError) as reason:
        raise CheckpointError(f"cannot write {folder}: {getattr(reason, 'strerror', None) or reason}") from reason
    finally:
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        elif replaced.exists():  # the second rename failed: put the old checkpoint back
            replaced.rename(folder)


def refuse_foreign(folder: Path) -> None:
    """Raise CheckpointError where save() would replace anything but a checkpoint."""
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder} holds something that is not a checkpoint: choose another folder")
    elif folder.exists():
        raise CheckpointError(f"{folder} is a file, not a folder: choose another name")


def _write(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    write_json(folder / INDEX, _model_index(str(checkpoint.scheduler_config["_class_name"])))
    write_json(
        folder / RECORD,
        {
            "variant": checkpoint.variant,
            "source": checkpoint.source,
            "licence": checkpoint.licence.name,
            "guidance_scale": checkpoint.guidance_scale,
        },
    )
    (folder / "LICENSE").write_text(checkpoint.licence.notice, encoding="utf-8")
    vocabulary.save(checkpoint.tokenizer, folder / "tokenizer")

    scheduler = {**checkpoint.scheduler_config, "_diffusers_version": diffusers.__version__}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)

    for name, model in (("unet", checkpoint.unet), ("vae", checkpoint.vae)):
        config = json.loads(model.to_json_string())
        config.pop("_name_or_path", None)  # a path on the machine that loaded it
        write_json(folder / name / "config.json", config)
        _write_tensors(model.state_dict(), folder / name / "diffusion_pytorch_model.safetensors", dtype)

    text_config = json.loads(checkpoint.text_encoder.config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "dtype", "torch_dtype"):
        text_config.pop(key, None)
    write_json(folder / "text_encoder" / "config.json", {**text_config, "architectures": ["CLIPTextModel"]})
    tensors = {with_clip_prefix(key): tensor for key, tensor in checkpoint.text_encoder.state_dict().items()}
    _write_tensors(tensors, folder / "text_encoder" / "model.safetensors", dtype)


def _model_index(scheduler: str) -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        cast = tensor.detach().to(dtype=dtype if tensor.is_floating_point() else None).contiguous()
        if cast.dtype != tensor.dtype and not torch.isfinite(cast).all():
            value = tensor.detach()[~torch.isfinite(cast)].flatten()[0].item()
            raise CheckpointError(
                f"{key} of the {path.parent.name} holds {value:g}, which {str(cast.dtype).removeprefix('torch.')} "
                "cannot store: keep fp32"
            )
        # safetensors refuses two tensors in one memory, as tied weights are.
        whole[key] = cast.clone() if cast.untyped_storage().data_ptr() in storages else cast
        storages.add(cast.untyped_storage().data_ptr())
    save_file(whole, str(path), metadata={"format": "pt"})
    # safetensors 0.8 lets the owner alone read its files; weights are as readable as the config beside them.
    path.chmod((path.parent / "config.json").stat().st_mode & 0o777)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
