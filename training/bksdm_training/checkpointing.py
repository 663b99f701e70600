"""Training state on disk: written whole or not at all, the last few kept, the newest whole one found again.

A state is a folder `step-00001200/` of safetensors files (one per group of tensors) and `state.json`. There is no
random state to save: every draw comes from a generator seeded by (seed, step)."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from bksdm_training.records import ResumeError, save_tensors

_STEP = re.compile(r"step-(\d{8})")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_UNFINISHED = ".writing-"  # what is not whole yet, or not any more: swept by whoever looks next

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """One saved moment: the step after which it was taken, its tensors by group, and plain facts."""

    step: int
    groups: Mapping[str, dict[str, Tensor]]
    facts: Mapping[str, object]


def save(folder: Path, state: State, *, keep: int = 2) -> Path:
    """Write `state` as `folder/step-XXXXXXXX`, then drop all but the newest `keep`."""
    with writing(folder, state.step, state.facts, tuple(state.groups), keep=keep) as staging:
        for name, tensors in state.groups.items():
            save_tensors(tensors, staging / f"{name}.safetensors")
    return folder / f"step-{state.step:08d}"


@contextmanager
def writing(
    folder: Path, step: int, facts: Mapping[str, object], groups: Sequence[str], *, keep: int
) -> Iterator[Path]:
    """A folder to write a state into, NAME.safetensors a group; it takes its place when the block ends, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED))
    staging.chmod(folder.stat().st_mode & 0o777)
    try:
        yield staging
        content = {"step": step, "groups": sorted(groups), **facts}
        (staging / "state.json").write_text(json.dumps(content, indent=2) + "\n")
        if target.exists():
            _remove(target)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in steps(folder)[:-keep]:
        _remove(folder / f"step-{old:08d}")


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
            state = _read(folder / f"step-{step:08d}", step)
            for damaged in found[found.index(step) + 1 :]:  # or they would be the newest ones that are kept
                _remove(folder / f"step-{damaged:08d}")
            return state
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


def steps(folder: Path) -> list[int]:
    """The steps of all whole states in `folder`, ascending."""
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def module_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, whole and on the CPU in the main process (elsewhere it may be empty), also of one
    that is wrapped for data parallelism or sharded: every process must call it. They may be the module's own."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=_WHOLE))


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a wrapped model's state_dict holds, under plain names and whole: every process must call it."""
    return {
        plain_name(key): (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for key, value in tensors.items()
    }


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the module carries these weights and is in eval mode."""
    own, was_training = {key: value.clone() for key, value in module.state_dict().items()}, module.training
    module.load_state_dict(dict(tensors))
    module.eval()
    try:
        yield
    finally:
        module.load_state_dict(own)
        module.train(was_training)


def restore_module(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `module_tensors` took out; only the main process need have it. Raises ResumeError naming the first
    key that does not fit."""
    if _is_main():
        check_fit({plain_name(key): value for key, value in model.state_dict().items()}, tensors)
    set_model_state_dict(model, dict(tensors), options=_from_main())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, "<parameter>/<name>"; its hyper-parameters stay in the config. As
    `module_tensors`, for every process to call."""
    whole = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    state = cast(dict[str, dict[str, Tensor]], whole.get("state", {}))
    return {
        f"{parameter}/{name}": torch.as_tensor(value)
        for parameter, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out; only the main process need have it. The tensors become its own."""
    nested: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        parameter, name = key.rsplit("/", 1)
        nested.setdefault(parameter, {})[name] = value
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    whole: dict[str, Any] = {"state": nested, "param_groups": groups} if _is_main() else {}
    set_optimizer_state_dict(model, optimizer, whole, options=_from_main())


def plain_name(key: str) -> str:
    """A parameter's name without what a wrapper for data parallelism or compilation puts in front."""
    return key.removeprefix("module.").replace("_orig_mod.", "")


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_main() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ResumeError naming the first key that only one of them has, or has in another shape."""
    for key in sorted(own.keys() | tensors.keys()):
        if key not in own or key not in tensors or own[key].shape != tensors[key].shape:
            raise ResumeError(f"the saved state does not fit this model at {key}: it was made with other settings")
