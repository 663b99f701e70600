"""Training state on disk: written whole or not at all, the last few kept, the newest whole one found again.

A state is a folder `step-00001200/` of safetensors files (one per group of tensors) and `state.json`. There is no
random state to save: every draw comes from a generator seeded by (seed, step)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_STEP = re.compile(r"step-(\d{8})")
_UNFINISHED = ".writing-"  # what is not whole yet, or not any more: swept by whoever looks next

logger = logging.getLogger(__name__)


class ResumeError(Exception):
    """What was saved does not belong to this run, or cannot be read."""


@dataclass(frozen=True)
class State:
    """One saved moment: the step after which it was taken, its tensors by group, and plain facts."""

    step: int
    groups: Mapping[str, dict[str, Tensor]]
    facts: Mapping[str, object]


def save(folder: Path, state: State, *, keep: int = 2) -> Path:
    """Write `state` as `folder/step-XXXXXXXX`, then drop all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{state.step:08d}"
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED))
    try:
        for name, tensors in state.groups.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, staging / f"{name}.safetensors")
        facts = {"step": state.step, "groups": sorted(state.groups), **state.facts}
        (staging / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
        if target.exists():
            _remove(target)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in steps(folder)[:-keep]:
        _remove(folder / f"step-{old:08d}")
    return target


def load_newest(folder: Path) -> State | None:
    """The newest state that can be read, or None when there is none yet. Half-written ones of a killed run are removed.

    A damaged state is passed over with a warning. Raises ResumeError when all are damaged."""
    if not folder.is_dir():
        return None
    for stale in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(stale, ignore_errors=True)
    found = steps(folder)
    for step in reversed(found):
        try:
            return _read(folder / f"step-{step:08d}", step)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s is damaged (%s) and is passed over", folder / f"step-{step:08d}", reason)
    if found:
        raise ResumeError(f"every state in {folder} is damaged: remove the folder to begin again")
    return None


def _read(path: Path, step: int) -> State:
    facts = json.loads((path / "state.json").read_text())
    if facts.pop("step") != step:
        raise ValueError("state.json says another step")
    return State(step, {name: load_file(path / f"{name}.safetensors") for name in facts.pop("groups")}, facts)


def _remove(state: Path) -> None:
    """Out of sight first: a kill while its files go must not leave half a state that looks whole."""
    doomed = Path(tempfile.mkdtemp(dir=state.parent, prefix=_UNFINISHED))
    state.rename(doomed / state.name)
    shutil.rmtree(doomed, ignore_errors=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, in the order of their names: whether two modules are the same one."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        total.update(tensors[key].detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def steps(folder: Path) -> list[int]:
    """The steps of all whole states in `folder`, ascending."""
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, "<parameter index>.<name>"; its hyper-parameters stay in the config."""
    flat: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            flat[f"{index}.{name}"] = torch.as_tensor(value)
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out."""
    nested: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        nested.setdefault(int(index), {})[name] = value.clone()  # load_state_dict keeps the tensor itself
    whole = optimizer.state_dict()
    whole["state"] = nested
    optimizer.load_state_dict(whole)


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights that must fit exactly. Raises ResumeError naming the first key that does not."""
    check_fit(module.state_dict(), tensors)
    module.load_state_dict(dict(tensors))


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ResumeError naming the first key that only one of them has, or has in another shape."""
    for key in sorted(own.keys() | tensors.keys()):
        if key not in own or key not in tensors or own[key].shape != tensors[key].shape:
            raise ResumeError(f"the saved state does not fit this model at {key}: it was made with other settings")
