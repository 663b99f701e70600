"""The training loop that all stages share: resumable, with EMA, progress and a loss log, on any number of processes.

Processes, mixed precision and sharding are accelerate's; the loop asks no more of it than `prepare`, `backward` and
`clip_grad_norm_`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bksdm_training import checkpointing
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import LoopConfig
from bksdm_training.progress import Log, Progress

logger = logging.getLogger(__name__)
LossAt = Callable[[nn.Module, int, int], Mapping[str, Tensor]]
OnCheckpoint = Callable[[int, Mapping[str, Tensor], Path], None]
# The scale of fp16 losses halves at each overflow; after this many in a row there is nothing left to halve.
_MOST_OVERFLOWS = 50


class DivergedError(Exception):
    """The loss is no longer a number."""


def run(
    name: str,
    module: nn.Module,
    loss_at: LossAt,
    config: LoopConfig,
    folder: Path,
    *,
    accelerator: Accelerator,
    on_checkpoint: OnCheckpoint = lambda step, average, folder: None,
    on_saved: OnCheckpoint = lambda step, average, folder: None,
    made_on: str = "",
    rates: Mapping[str, float] | None = None,
    pictures_at: Callable[[int], int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train `module` and return it with the averaged (EMA) weights, in eval mode.

    loss_at(model, step, part) gives the terms of the loss of one part (0..accumulate-1) of step 1..steps; their sum is
    minimised, the mean over parts and processes. `model` is the module as it is to be called (data parallel, sharded).
    Whatever it draws must follow from step and part alone: a run that was killed goes on from its newest state in
    `folder`. on_checkpoint(step, average, staging) sees the averaged weights by name, whole and on the CPU, in the main
    process, and may write into `staging`, the folder of that state; what it raises ends the run. on_saved(step,
    average, folder) comes after, for what is only looked at: where it fails, that is said and the run goes on.
    made_on: what the run depends on (a hash); a state made on something else is refused. rates: learning rate factor of
    the parameters whose name ends so; 1 for the others. pictures_at(step): how many pictures a step sees, where that is
    not always the batch size. on_step(step): called in every process after a step, and may raise to end the run.
    Progress on stderr: a bar on a terminal, elsewhere a line at every checkpoint.
    Raises DivergedError, checkpointing.ResumeError."""
    # cuDNN's attention, torch 2.11's first choice on Hopper, gave NaN gradients in bf16 (one batch in four of the demo
    # teacher, H100; flash, memory-efficient and plain attention gave none).
    torch.backends.cuda.enable_cudnn_sdp(False)
    optimizer = torch.optim.AdamW(
        _groups(module, rates or {}),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=config.fused or None,  # not False, which would also forbid foreach
    )
    facts: dict[str, object] = {"stage": name, "made_on": made_on}
    model, prepared = accelerator.prepare(module, optimizer)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    done, earlier = _resume(folder, model, prepared.optimizer, average, facts, accelerator)
    if done > config.steps:
        raise ResumeError(f"{folder} is at step {done} already: ask for that many or more, or choose another --output")
    first, started, overflows = done + 1, time.monotonic(), 0
    model.train()
    with (
        Log(folder / "log.jsonl", first, written=accelerator.is_main_process) as log,
        Progress(name, done, config, pictures_at, shown=accelerator.is_main_process) as progress,
    ):
        for step in range(first, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step) * group["rate"]
            terms = _gradients(model, loss_at, step, config, accelerator)
            norm = _number(accelerator.clip_grad_norm_(model.parameters(), config.clip))
            overflows = 0 if math.isfinite(norm) else overflows + 1
            if overflows > (_MOST_OVERFLOWS if accelerator.scaler else 0):
                raise DivergedError(f"{name}: the gradient is {norm} at step {step}: lower the learning rate")
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            _average(average, model, min(config.ema_decay, (1 + step) / (10 + step)))
            figures = {key: value.item() for key, value in terms.items()}
            log.write(step, figures)
            accelerator.log({**figures, "gradient_norm": norm, "learning_rate": config.learning_rate_at(step)}, step)
            progress.stepped(step, figures)
            if on_step:
                on_step(step)
            if step % config.checkpoint_every == 0 or step == config.steps:
                seconds = earlier + time.monotonic() - started
                state = _State(folder, step, {**facts, "seconds": seconds}, config.keep)
                _save(state, model, prepared.optimizer, average, accelerator, on_checkpoint, on_saved)
                progress.saved(step, figures)
    model.load_state_dict(average)
    return module.eval()


def _gradients(
    model: nn.Module, loss_at: LossAt, step: int, config: LoopConfig, accelerator: Accelerator
) -> dict[str, Tensor]:
    """One step's backward passes; the terms of its loss, the mean over parts and processes."""
    totals: dict[str, Tensor] = {}
    for part in range(config.accumulate):
        is_last = part == config.accumulate - 1  # gradients travel once, with the last part
        with nullcontext() if is_last else accelerator.no_sync(model):
            with _precision(config, accelerator):
                terms = loss_at(model, step, part)
            accelerator.backward(torch.stack(list(terms.values())).sum() / config.accumulate)
        for key, value in terms.items():
            totals[key] = totals.get(key, 0) + value.detach().float() / config.accumulate
    names = sorted(totals)
    mean: Tensor = accelerator.reduce(torch.stack([totals[key] for key in names]), "mean")  # type: ignore[assignment]
    by_name = dict(zip(names, mean.cpu(), strict=True))
    return {key: by_name[key] for key in totals}


def _number(norm: Any) -> float:
    """The norm over all shards: of its own one alone each process would judge by itself."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _precision(config: LoopConfig, accelerator: Accelerator) -> Any:
    if config.bf16:
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


def _groups(module: nn.Module, rates: Mapping[str, float]) -> list[dict[str, object]]:
    """The trainable parameters as optimizer groups by their learning rate factor; every parameter is in one."""
    groups: dict[str, list[nn.Parameter]] = {end: [] for end in ("", *rates)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[next((end for end in rates if name.endswith(end)), "")].append(parameter)
    return [{"params": own, "rate": rates.get(end, 1.0)} for end, own in groups.items() if own]


@dataclass(frozen=True)
class _State:
    folder: Path
    step: int
    facts: Mapping[str, object]
    keep: int


def _save(
    state: _State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    accelerator: Accelerator,
    on_checkpoint: OnCheckpoint,
    on_saved: OnCheckpoint,
) -> None:
    """Write a state from the main process; the others help to gather it, one group after the other."""
    groups: dict[str, Callable[[], dict[str, Tensor]]] = {
        "weights": lambda: checkpointing.module_tensors(model),
        "optimizer": lambda: checkpointing.optimizer_tensors(model, optimizer),
        "ema": lambda: checkpointing.whole_tensors(average),
    }
    if not accelerator.is_main_process:
        for gather in groups.values():
            gather()
    else:
        facts = state.facts
        if accelerator.scaler is not None:
            facts = {**facts, "scaler": accelerator.scaler.state_dict()}
        with checkpointing.writing(state.folder, state.step, facts, tuple(groups), keep=state.keep) as staging:
            tensors: dict[str, Tensor] = {}
            for name, gather in groups.items():
                tensors = gather()
                checkpointing.save_tensors(tensors, staging / f"{name}.safetensors")
            on_checkpoint(state.step, tensors, staging)  # the average, which comes last
        try:
            on_saved(state.step, tensors, state.folder / f"step-{state.step:08d}")
        except (OSError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            logger.warning("step %d is saved, but its pictures could not be drawn: %s", state.step, reason)
    accelerator.wait_for_everyone()


def _resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    facts: Mapping[str, object],
    accelerator: Accelerator,
) -> tuple[int, float]:
    """Put the newest state back; its step (0: there is none) and the seconds that the run has taken until then.

    The main process reads it, and the others get it from there: the folder need not be shared."""
    found: list[Any] = [None]
    state = None
    if accelerator.is_main_process:
        try:
            state = checkpointing.load_newest(folder)
            if state is not None:
                _check(folder, state, model, facts)
                found = [(state.step, dict(state.facts))]
        except (ResumeError, OSError) as error:
            found = [str(error)]  # every process must end, not wait for this one
    broadcast_object_list(found)
    if isinstance(found[0], str):
        raise ResumeError(found[0])
    if found[0] is None:
        return 0, 0.0
    step, known = found[0]
    groups = dict(state.groups) if state else {"weights": {}, "ema": {}, "optimizer": {}}
    state = None
    checkpointing.restore_module(model, groups.pop("ema"))
    for key, value in model.state_dict().items():
        average[key].copy_(value)
    checkpointing.restore_module(model, groups.pop("weights"))
    checkpointing.restore_optimizer(model, optimizer, groups.pop("optimizer"))
    if accelerator.scaler is not None and "scaler" in known:
        accelerator.scaler.load_state_dict(known["scaler"])
    logger.info("resumed at step %d from %s", step, folder)
    return step, float(str(known.get("seconds", 0)))


def _check(folder: Path, state: checkpointing.State, model: nn.Module, facts: Mapping[str, object]) -> None:
    for key, value in facts.items():
        if state.facts.get(key) != value:
            raise ResumeError(
                f"{folder} was trained with another {key} ({state.facts.get(key)}, now {value}): "
                "remove it or choose another output folder"
            )
    missing = [group for group in ("weights", "ema", "optimizer") if group not in state.groups]
    if missing:
        raise ResumeError(f"{folder}, step {state.step}: the state has no {missing[0]}, so this loop did not write it")
    own = {checkpointing.plain_name(key): value for key, value in model.state_dict().items()}
    checkpointing.check_fit(own, state.groups["weights"])
    checkpointing.check_fit(own, state.groups["ema"])


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """All floating-point tensors in one call, which a GPU starts as few kernels instead of one a tensor."""
    now = module.state_dict()
    floats = [key for key, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in floats], [now[key] for key in floats], 1 - decay)
    for key in now.keys() - set(floats):
        average[key].copy_(now[key])
