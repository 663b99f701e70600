"""The training loop that both stages of the teacher share: resumable, with EMA, progress and a loss log."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bksdm_training import checkpointing
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import LoopConfig
from bksdm_training.data import seeded

logger = logging.getLogger(__name__)
LossAt = Callable[[int, torch.Generator], Mapping[str, Tensor]]


class DivergedError(Exception):
    """The loss is no longer a number."""


def run(
    name: str,
    module: nn.Module,
    loss_at: LossAt,
    config: LoopConfig,
    folder: Path,
    *,
    device: torch.device,
    on_checkpoint: Callable[[int, nn.Module], None],
    made_on: str = "",
    rates: Mapping[str, float] | None = None,
    pictures_at: Callable[[int], int] | None = None,
) -> nn.Module:
    """Train `module` and return it with the averaged (EMA) weights, in eval mode.

    loss_at(step, generator) gives the terms of the loss of step 1..steps; their sum is minimised. All its draws come
    from `generator`. A run that was killed goes on from its newest state in `folder`. `on_checkpoint(step, module)`
    sees the averaged weights. made_on: what the run depends on (a hash); a state made on something else is refused.
    rates: learning rate factor of the parameters whose name ends so; 1 for the others. pictures_at(step): how many
    pictures a step sees, where that is not always the batch size. Progress on stderr: a bar on a terminal, elsewhere
    a line at every checkpoint.
    Raises DivergedError, checkpointing.ResumeError."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_groups(module, rates or {}), lr=0.0, weight_decay=config.weight_decay)
    average = {key: value.detach().clone() for key, value in module.state_dict().items()}
    facts: dict[str, object] = {"stage": name, "made_on": made_on}
    done, earlier = _resume(folder, module, optimizer, average, facts)
    if done > config.steps:
        raise ResumeError(f"{folder} is at step {done} already: ask for that many or more, or choose another --output")
    first, started = done + 1, time.monotonic()
    module.train()
    with (
        _Log(folder / "log.jsonl", first) as log,
        _Progress(name, done, config, pictures_at) as progress,
    ):
        for step in range(first, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step) * group["rate"]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                terms = loss_at(step, seeded(config.seed, step))
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainable, config.clip)
            if not torch.isfinite(norm):
                raise DivergedError(f"{name}: the gradient is {norm.item()} at step {step}: lower the learning rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _average(average, module, min(config.ema_decay, (1 + step) / (10 + step)))
            figures = {key: value.item() for key, value in terms.items()}
            log.write(step, figures)
            progress.stepped(step, figures)
            if step % config.checkpoint_every == 0 or step == config.steps:
                groups = {
                    "weights": module.state_dict(),
                    "ema": average,
                    "optimizer": checkpointing.optimizer_tensors(optimizer),
                }
                checkpointing.save(
                    folder,
                    checkpointing.State(step, groups, {**facts, "seconds": earlier + time.monotonic() - started}),
                )
                with _Swapped(module, average):
                    on_checkpoint(step, module)
                progress.saved(step, figures)
    module.load_state_dict(average)
    return module.eval()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The loss log of a stage: one {"step", term: value, ...} a step."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may have cut the last one


def _groups(module: nn.Module, rates: Mapping[str, float]) -> list[dict[str, object]]:
    """The trainable parameters as optimizer groups by their learning rate factor; every parameter is in one."""
    groups: dict[str, list[nn.Parameter]] = {end: [] for end in ("", *rates)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[next((end for end in rates if name.endswith(end)), "")].append(parameter)
    return [{"params": own, "rate": rates.get(end, 1.0)} for end, own in groups.items() if own]


def _resume(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    facts: Mapping[str, object],
) -> tuple[int, float]:
    """Put the newest state back; its step (0: there is none) and the seconds that the run has taken until then."""
    state = checkpointing.load_newest(folder)
    if state is None:
        return 0, 0.0
    for key, value in facts.items():
        if state.facts.get(key) != value:
            raise ResumeError(
                f"{folder} was trained with another {key} ({state.facts.get(key)}, now {value}): "
                "remove it or choose another output folder"
            )
    missing = [group for group in ("weights", "ema", "optimizer") if group not in state.groups]
    if missing:
        raise ResumeError(f"{folder}, step {state.step}: the state has no {missing[0]}, so this loop did not write it")
    checkpointing.restore_module(module, state.groups["weights"])
    checkpointing.check_fit(average, state.groups["ema"])
    checkpointing.restore_optimizer(optimizer, state.groups["optimizer"])
    for key, value in state.groups["ema"].items():
        average[key].copy_(value)
    logger.info("resumed at step %d from %s", state.step, folder)
    return state.step, float(str(state.facts.get("seconds", 0)))


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


class _Swapped:
    """Within the block the module carries the averaged weights and is in eval mode."""

    def __init__(self, module: nn.Module, average: dict[str, Tensor]) -> None:
        self.module, self.average = module, average

    def __enter__(self) -> None:
        self.own = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.load_state_dict(self.own)
        self.module.train()


class _Progress:
    """A bar on stderr where that is a terminal; elsewhere a line a checkpoint, for a log keeps every state of a bar."""

    def __init__(
        self, name: str, done: int, config: LoopConfig, pictures_at: Callable[[int], int] | None = None
    ) -> None:
        self.name, self.done, self.config = name, done, config
        self.pictures_at = pictures_at or (lambda step: config.batch_size)
        self.pictures, self.started, self.since = 0, time.monotonic(), time.monotonic()
        self.bar = tqdm(total=config.steps, initial=done, desc=name, unit="step", dynamic_ncols=True, disable=None)

    def stepped(self, step: int, figures: Mapping[str, float]) -> None:
        self.pictures += self.pictures_at(step)
        self.bar.set_postfix({key: f"{value:.4f}" for key, value in figures.items()}, refresh=False)
        self.bar.update()

    def saved(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if self.bar.disable:
            losses = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
            rate = self.pictures / (now - self.since)  # since the line before, checkpoint and samples included
            left = tqdm.format_interval((now - self.started) / (step - self.done) * (self.config.steps - step))
            line = f"{self.name}: step {step:,} of {self.config.steps:,}, {losses}, {rate:.1f} images/s, {left} left"
            tqdm.write(line, file=sys.stderr)
        self.pictures, self.since = 0, now

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class _Log:
    """Append-only loss log; steps after the resumed state are dropped, since they are trained again."""

    def __init__(self, path: Path, first: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path.parent) if row["step"] < first]
        staging = path.with_name(f".{path.name}")
        staging.write_text("".join(json.dumps(row) + "\n" for row in kept))
        staging.replace(path)
        self.file = path.open("a", buffering=1)  # a line at a time: what a kill can cut off is one line

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in figures.items()}}) + "\n")

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
