"""What a run says of itself on disk: what it was begun with, and what would repeat it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from bksdm_training.checkpointing import ResumeError


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


def machine(device: torch.device, *packages: str) -> dict[str, object]:
    """What a run's speed and last digits depend on: device, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("bksdm", "torch", "diffusers", *packages)},
    }


def flattened(value: object, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat.update(flattened(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
