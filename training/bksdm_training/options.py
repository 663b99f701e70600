"""What the commands of bksdm-train share: options, what they open, and errors as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bksdm.variants import VARIANTS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from bksdm.checkpoint import Checkpoint
    from bksdm.variants import Variant

STUDENTS = tuple(name for name, row in VARIANTS.items() if row.teacher and not name.endswith("-2m"))
TEACHERS = tuple(name for name, row in VARIANTS.items() if not row.teacher)


def with_options(*options: Callable[[Any], Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that several commands have, in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# Where weights come from, and where and how data is read.
SOURCES = (
    click.option("--revision", help="Commit, branch or tag on the Hub."),
    click.option("--allow-pickle", is_flag=True, help="Also read .bin and .ckpt files, as plain tensors only."),
    click.option("--cpu", is_flag=True, help="Not on the GPU."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads."),
    click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read data."),
    click.option(
        "--skip-limit",
        type=click.FloatRange(0, 1),
        default=0.01,
        show_default=True,
        help="Share of unusable examples that is skipped rather than an error.",
    ),
)
of_the_teacher = with_options(
    click.option(
        "--teacher",
        metavar="CHECKPOINT",
        help="A diffusers folder, a .safetensors file, or random.  [default: its own, from the Hub]",
    ),
    click.option(
        "--teacher-variant",
        type=click.Choice(TEACHERS),
        help="What the teacher is, where a single file does not say it.",
    ),
    *SOURCES,
)
of_the_schedule = with_options(
    click.option("--warmup", type=click.IntRange(0), default=0, help="Steps of rising learning rate."),
    click.option(
        "--decay-share", type=click.FloatRange(0, 1), default=0.0, help="Share of steps, the last ones, of falling."
    ),
    click.option("--weight-decay", type=click.FloatRange(0), default=1e-2),
    click.option("--clip", type=click.FloatRange(0, min_open=True), default=1.0, help="Norm of the gradient."),
)
of_the_run = with_options(
    click.option("--caption-dropout", type=click.FloatRange(0, 1), default=0.0),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1234),
    click.option(
        "--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), help="[default: as accelerate is configured]"
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory for a third more computing."),
    click.option("--keep", type=click.IntRange(1), default=2, help="States on disk."),
    click.option("--shown", type=click.IntRange(0, 8), default=4, help="Captions drawn at each checkpoint."),
)
micro_batch = click.option(
    "--micro-batch", type=click.IntRange(1), help="Pictures a process takes at once; the rest accumulates."
)
LOOP = "steps learning_rate warmup decay_share weight_decay clip ema_decay seed checkpoint_every keep"
RUN = "flip caption_dropout micro_batch gradient_checkpointing workers skip_limit shown"


def named(options: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split()}


def open_accelerator(cpu: bool, mixed_precision: str | None, output: Path | None) -> Accelerator:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from bksdm_training.allocator import keep_freed_memory

    trackers = {}
    if mixed_precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise click.ClickException("--mixed-precision fp16 needs a GPU: take bf16 or no")
    if output is not None and find_spec("tensorboard"):
        trackers = {"log_with": "tensorboard", "project_dir": output}
    # Parts of a step are the loop's own: told of them too (by its environment), accelerate would divide a second time.
    once = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_plugin=once, **trackers)
    sharding = getattr(accelerator.state, "fsdp_plugin", None)
    if sharding is not None and sharding.fsdp_version == 1:
        raise click.ClickException("accelerate is configured for FSDP 1: set fsdp_version to 2")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def load_teacher(row: Variant, options: dict[str, Any]) -> Checkpoint:
    import torch

    from bksdm import checkpoint

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    weights, said = options["teacher"], options["teacher_variant"]
    if weights in TEACHERS and not Path(weights).exists():
        weights, said = None, weights
    if weights in (None, "random"):
        said = said or row.teacher
    return checkpoint.load(weights, variant=said, revision=options["revision"], allow_pickle=options["allow_pickle"])


@contextmanager
def errors_said() -> Iterator[None]:
    """A user's mistake, or the machine's limits, as one sentence."""
    import torch

    from bksdm.errors import CheckpointError, IncompatibleTeacher, VariantError
    from bksdm.packages import PackageError
    from bksdm_training.checkpointing import ResumeError
    from bksdm_training.data import DataError
    from bksdm_training.loop import DivergedError

    known = (
        DataError,
        ResumeError,
        DivergedError,
        PackageError,
        CheckpointError,
        IncompatibleTeacher,
        VariantError,
        OSError,
    )
    try:
        yield
    except known as error:
        raise click.ClickException(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            "the GPU is out of memory: take fewer pictures at once, or another device"
        ) from error
