"""What a run says of itself on disk: what it was begun with, and what would repeat it."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


class ResumeError(Exception):
    """What was saved does not belong to this run, or cannot be read."""


def same_run(output: Path, now: Mapping[str, object], said: Mapping[str, str]) -> None:
    """Write what a run in `output` is begun with, or refuse to go on with something else.

    said: what each entry of `now` is called in that refusal. Raises ResumeError."""
    path = output / "config.json"
    current = json.loads(json.dumps(now))
    if path.is_file():
        try:
            then = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ResumeError(f"{path} is damaged ({error}): choose another --output") from error
        if then.keys() != current.keys():
            raise ResumeError(f"{output} was begun by another command or version: choose another --output")
        if others := [said[key] for key in current if then[key] != current[key]]:
            raise ResumeError(f"{output} was begun with other {' and '.join(others)}: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, current)


def write_json(path: Path, content: object) -> None:
    """The whole file or the one that was there."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(json.dumps(content, indent=2) + "\n")
    staging.replace(path)


def copy_whole(path: Path, folder: Path) -> None:
    """A file's copy in a folder, whole or not there; nothing where there is no such file."""
    if path.is_file():
        staging = folder / f".{path.name}"
        shutil.copyfile(path, staging)
        staging.replace(folder / path.name)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file as readable as its folder: the library makes it the writer's alone, on shared disks too."""
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)


def machine(device: torch.device, *packages: str) -> dict[str, object]:
    """What a run's speed and last digits depend on: device, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {package: _version(package) for package in ("bksdm", "torch", "diffusers", *packages)},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
