"""bksdm-train: distilling students, and the demo data and its teacher."""

from __future__ import annotations

import logging
import os
import sys
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

EXTRA = "training"
STUDENTS = tuple(name for name, row in VARIANTS.items() if row.teacher and not name.endswith("-2m"))
TEACHERS = tuple(name for name, row in VARIANTS.items() if not row.teacher)
V2_BATCH = 128  # of the published v2 run; v1: DistillConfig's own


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bksdm")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def commands(verbose: bool) -> None:
    """Train compressed Stable Diffusion models, and the small one that ships for demonstration."""
    # At its import diffusers reports which of several optimum distributions it picked: nothing for our users.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)


@commands.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--sources", default="fluent,noto", show_default=True, help="Which picture sets, comma-separated.")
@click.option("--groups", help="Which kinds of things, comma-separated.  [default: all seven]")
@click.option("--size", type=click.IntRange(32, 1024), default=256, show_default=True, help="Pixels, square.")
def data(output: Path, sources: str, groups: str | None, size: int) -> None:
    """Fetch the emoji pictures and captions by package name and write them as an image folder."""
    from bksdm.packages import PackageError
    from bksdm_training.emoji import GROUPS, STYLES, build

    chosen = _choices("--sources", sources, tuple(STYLES))
    kinds = tuple(GROUPS) if groups is None else _choices("--groups", groups, tuple(GROUPS))
    try:
        summary = build(output, sources=chosen, groups=kinds, size=size)
    except (PackageError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: {summary['counts']}")


@commands.command()
@click.option("--data", "folder", type=click.Path(path_type=Path), required=True, help="From bksdm-train data.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--preset", type=click.Choice(["auto", "cpu", "family", "cuda"]), default="auto", show_default=True)
@click.option(
    "--init",
    metavar="CHECKPOINT",
    help="Go on from this model: its autoencoder stays as it is, text encoder and U-Net are trained on.",
)
@click.option("--vae-steps", type=click.IntRange(1), help="Instead of the preset's.")
@click.option("--unet-steps", type=click.IntRange(1), help="Instead of the preset's.")
@click.option("--batch-size", type=click.IntRange(1), help="Pictures a step of the U-Net, instead of the preset's.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def teacher(
    folder: Path,
    output: Path,
    preset: str,
    init: str | None,
    vae_steps: int | None,
    unet_steps: int | None,
    batch_size: int | None,
    threads: int | None,
) -> None:
    """Train the demo teacher from scratch; run again after a kill to go on."""
    import torch

    from bksdm_training.config import PRESETS, with_changes
    from bksdm_training.teacher import train_teacher

    if threads:
        torch.set_num_threads(threads)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if preset == "auto" else preset
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--preset cuda needs a CUDA device and torch sees none: use --preset cpu")
    config = with_changes(PRESETS[kind], vae_steps, unet_steps, batch_size)
    device = torch.device("cuda" if kind == "cuda" else "cpu")
    with _errors_said():
        made = train_teacher(config, folder, output, device, init=init)
    click.echo(made)


def _with_options(*options: Callable[[Any], Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that several commands have, in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# Where weights come from, and where and how data is read.
_SOURCES = (
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
_of_the_teacher = _with_options(
    click.option(
        "--teacher",
        metavar="CHECKPOINT",
        help="A diffusers folder, a .safetensors file, demo, or random.  [default: its own, from the Hub]",
    ),
    click.option(
        "--teacher-variant",
        type=click.Choice(TEACHERS),
        help="What the teacher is, where a single file does not say it.",
    ),
    *_SOURCES,
)
_of_the_schedule = _with_options(
    click.option("--warmup", type=click.IntRange(0), default=0, help="Steps of rising learning rate."),
    click.option(
        "--decay-share", type=click.FloatRange(0, 1), default=0.0, help="Share of steps, the last ones, of falling."
    ),
    click.option("--weight-decay", type=click.FloatRange(0), default=1e-2),
    click.option("--clip", type=click.FloatRange(0, min_open=True), default=1.0, help="Norm of the gradient."),
)
_of_the_run = _with_options(
    click.option("--caption-dropout", type=click.FloatRange(0, 1), default=0.0),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1234),
    click.option(
        "--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), help="[default: as accelerate is configured]"
    ),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory for a third more computing."),
    click.option("--keep", type=click.IntRange(1), default=2, help="States on disk."),
    click.option("--shown", type=click.IntRange(0, 8), default=4, help="Captions drawn at each checkpoint."),
)
_micro_batch = click.option(
    "--micro-batch", type=click.IntRange(1), help="Pictures a process takes at once; the rest accumulates."
)
_LOOP = "steps learning_rate warmup decay_share weight_decay clip ema_decay seed checkpoint_every keep"
_RUN = "flip caption_dropout micro_batch gradient_checkpointing workers skip_limit shown"


@commands.command(context_settings={"show_default": True})
@click.option("--variant", type=click.Choice(STUDENTS), required=True, help="What to remove: the student's name.")
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="A folder with metadata.csv or .jsonl, tar shards, parquet files, or a cache from bksdm-train cache.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@_of_the_teacher
@click.option("--steps", type=click.IntRange(1), default=50_000)
@click.option("--batch-size", type=click.IntRange(1), help="Pictures a step, all processes.  [default: 256; v2: 128]")
@_micro_batch
@click.option("--size", type=click.IntRange(64), help="Pixels, square.  [default: the teacher's]")
@click.option(
    "--start", type=click.Choice(["teacher", "random"]), default="teacher", help="The student's first weights."
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-5)
@_of_the_schedule
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), default=0.9999)
@click.option("--task-weight", type=click.FloatRange(0), default=1.0, help="Of the noise itself.")
@click.option("--output-weight", type=click.FloatRange(0), default=1.0, help="Of the teacher's prediction.")
@click.option("--feature-weight", type=click.FloatRange(0), default=1.0, help="Of the teacher's features.")
@click.option(
    "--snr-gamma",
    type=click.FloatRange(0, min_open=True),
    help="Weigh timesteps by min(SNR + 1, gamma) / SNR.  [default: all alike]",
)
@click.option("--flip/--no-flip", default=True, help="Mirror half of the pictures.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile of the repeated blocks.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=5000, help="Steps.")
@_of_the_run
def distill(variant: str, folder: Path, output: Path, batch_size: int | None, size: int | None, **options: Any) -> None:
    """Distil a compressed student; run again after a kill to go on.

    The student is what block removal leaves of the teacher; it learns from pictures, from the teacher's predictions
    and from its features, as BK-SDM did (arXiv 2305.15798). OUTPUT/checkpoint is a diffusers checkpoint for
    bksdm-export --weights. On several GPUs: accelerate launch -m bksdm_training distill ...
    """
    from bksdm_training.config import DistillConfig, LoopConfig
    from bksdm_training.distill import distill as run
    from bksdm_training.losses import LossWeights
    from bksdm_training.material import open_material

    row = VARIANTS[variant]
    with _errors_said():
        accelerator = _accelerator(options["cpu"], options["mixed_precision"], output)
        teacher = _teacher(row, options)
        try:
            config = DistillConfig(
                size=size or teacher.image_size,
                loop=LoopConfig(
                    batch_size=batch_size or (V2_BATCH if row.family == "v2" else 256),
                    fused=True,
                    **_named(options, _LOOP),
                ),
                weights=LossWeights(
                    task=options["task_weight"],
                    output=options["output_weight"],
                    feature=options["feature_weight"],
                    snr_gamma=options["snr_gamma"],
                ),
                **_named(options, f"start compiled {_RUN}"),
            )
            config.parts(accelerator.num_processes)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        material = open_material(folder, teacher, config, index=output / "index.json")
        made = run(config, teacher, row, material, output, accelerator)
    if accelerator.is_main_process:
        click.echo(made)


@commands.command(context_settings={"show_default": True})
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), required=True, help="Pictures, as distill takes them."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the cache.")
@click.option("--variant", type=click.Choice(STUDENTS), default="small", help="Of whose teacher, where none is named.")
@_of_the_teacher
@click.option("--size", type=click.IntRange(64), help="Pixels, square.  [default: the teacher's]")
@click.option("--dtype", type=click.Choice(["fp16", "fp32"]), default="fp16", help="Of what is stored.")
@click.option("--flip/--no-flip", default=True, help="Mirrored pictures too.")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Pictures encoded at once.")
@click.option("--shard-size", type=click.IntRange(1), default=1024, help="Pictures a file.")
def cache(folder: Path, output: Path, variant: str, size: int | None, **options: Any) -> None:
    """Compute once what the frozen encoders give, so that distilling needs neither; run again after a kill to go on."""
    from bksdm_training.cache import build
    from bksdm_training.sources import open_source

    with _errors_said():
        accelerator = _accelerator(options["cpu"], "no", None)
        teacher = _teacher(VARIANTS[variant], options)
        size = size or teacher.image_size
        if size % 8:
            raise click.BadParameter(f"{size} is no multiple of 8", param_hint="--size")
        source = open_source(folder, index=output / "index.json")
        build(
            teacher,
            source,
            output,
            accelerator,
            size=size,
            **_named(options, "flip dtype batch_size shard_size workers skip_limit"),
        )
    if accelerator.is_main_process:
        click.echo(output)


@commands.command(context_settings={"show_default": True})
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Pictures with captions, as distill takes them; with --instance-prompt, a plain folder of pictures.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option(
    "--weights",
    metavar="CHECKPOINT",
    help="What is adapted: a diffusers folder, a .safetensors file, demo or random.  "
    "[default: the variant's own, from the Hub]",
)
@click.option("--variant", type=click.Choice(tuple(VARIANTS)), help="Which model.  [default: small, or what it is]")
@_with_options(*_SOURCES)
@click.option("--instance-prompt", metavar="TEXT", help='The subject\'s own: "a photo of sks dog" (DreamBooth).')
@click.option("--class-prompt", metavar="TEXT", help='Its class: "a photo of a dog". Half of each batch keeps it.')
@click.option(
    "--class-data", type=click.Path(path_type=Path), help="Pictures of the class.  [default: the model draws]"
)
@click.option("--class-count", type=click.IntRange(1), help="How many the model draws.  [default: 100]")
@click.option("--prior-weight", type=click.FloatRange(0), default=1.0, help="Of the loss on class pictures.")
@click.option("--rank", type=click.IntRange(1), default=8, help="Of the adapters.")
@click.option("--alpha", type=click.FloatRange(0, min_open=True), help="Adapters count alpha / rank.  [default: rank]")
@click.option("--text-encoder", is_flag=True, help="Adapt the text encoder too.")
@click.option("--steps", type=click.IntRange(1), default=1000)
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Pictures a step, all processes.")
@_micro_batch
@click.option("--size", type=click.IntRange(64), help="Pixels, square.  [default: the model's]")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4)
@_of_the_schedule
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), default=0.999)
@click.option("--flip/--no-flip", default=False, help="Mirror half of the pictures.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=250, help="Steps.")
@_of_the_run
@click.option("--validation-prompt", "prompts", metavar="TEXT", multiple=True, help="Draw this instead of captions.")
def lora(
    folder: Path,
    output: Path,
    weights: str | None,
    variant: str | None,
    size: int | None,
    alpha: float | None,
    prompts: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune a model by low-rank adapters (LoRA); run again after a kill to go on.

    OUTPUT/pytorch_lora_weights.safetensors is for bksdm-export --lora OUTPUT, and for diffusers' load_lora_weights.
    On several GPUs: accelerate launch -m bksdm_training lora ...

    \b
    bksdm-train lora --variant small --data pictures/ -o runs/style
    bksdm-train lora --variant small --data dog/ --instance-prompt "a photo of sks dog" \\
        --class-prompt "a photo of a dog" -o runs/dog
    """
    _check_prompts(options)
    import torch

    from bksdm import checkpoint
    from bksdm_training.config import AdaptConfig, LoopConfig
    from bksdm_training.lora import adapt
    from bksdm_training.material import open_material, open_subject
    from bksdm_training.prior import draw_class

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if variant is None and weights in (None, "random"):
        variant = "small"
    of_class = options["class_prompt"]
    with _errors_said():
        accelerator = _accelerator(options["cpu"], options["mixed_precision"], output)
        base = checkpoint.load(weights, variant=variant, **_named(options, "revision allow_pickle"))
        try:
            config = AdaptConfig(
                size=size or base.image_size,
                loop=LoopConfig(fused=True, **_named(options, f"batch_size {_LOOP}")),
                alpha=options["rank"] if alpha is None else alpha,
                prior_weight=options["prior_weight"] if of_class else None,
                **_named(options, f"rank text_encoder {_RUN}"),
            )
            config.parts(accelerator.num_processes)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if prompt := options["instance_prompt"]:
            classes = options["class_data"]
            if of_class and classes is None:
                count = options["class_count"] or 100  # diffusers' scripts' own
                classes = draw_class(base, of_class, count, config.size, output / "class", accelerator)
            material = open_subject(folder, prompt, base, config, prior=(classes, of_class) if of_class else None)
        else:
            material = open_material(folder, base, config, index=output / "index.json")
        made = adapt(config, base, material, output, accelerator, prompts=prompts)
    if accelerator.is_main_process:
        click.echo(made)


def _check_prompts(options: dict[str, Any]) -> None:
    """DreamBooth's options are of no use one without the other. Raises UsageError."""
    for name, needed in (
        ("class_prompt", "instance_prompt"),
        ("class_data", "class_prompt"),
        ("class_count", "class_prompt"),
    ):
        if options[name] is not None and options[needed] is None:
            given, wanted = (f"--{option.replace('_', '-')}" for option in (name, needed))
            raise click.UsageError(f"{given} needs {wanted} beside it")
    if options["class_data"] is not None and options["class_count"] is not None:
        raise click.UsageError("--class-count is of pictures that the model draws, and --class-data has some: name one")


def _named(options: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split()}


def _accelerator(cpu: bool, mixed_precision: str | None, output: Path | None) -> Accelerator:
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


def _teacher(row: Variant, options: dict[str, Any]) -> Checkpoint:
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
def _errors_said() -> Iterator[None]:
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


def _choices(option: str, given: str, valid: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in given.split(","))
    for part in chosen:
        if part not in valid:
            raise click.BadParameter(f"{part!r} is unknown: choose from {', '.join(valid)}", param_hint=option)
    return chosen


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 misuse or a missing extra, 130 interrupted."""
    try:
        commands(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"bksdm-train: {error.format_message()}", err=True)
        sys.exit(1)
    except click.Abort:
        click.echo("bksdm-train: interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        click.echo(f"bksdm-train: needs {error.name}: pip install 'bksdm[{EXTRA}]'", err=True)
        sys.exit(2)
