"""bksdm-train distill, and the cache that it may read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bksdm.variants import VARIANTS
from bksdm_training.options import (
    LOOP,
    RUN,
    STUDENTS,
    errors_said,
    load_teacher,
    micro_batch,
    named,
    of_the_run,
    of_the_schedule,
    of_the_teacher,
    open_accelerator,
)

V2_BATCH = 128  # of the published v2 run; v1: DistillConfig's own


@click.command(context_settings={"show_default": True})
@click.option("--variant", type=click.Choice(STUDENTS), required=True, help="What to remove: the student's name.")
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="A folder with metadata.csv or .jsonl, tar shards, parquet files, or a cache from bksdm-train cache.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@of_the_teacher
@click.option("--steps", type=click.IntRange(1), default=50_000)
@click.option("--batch-size", type=click.IntRange(1), help="Pictures a step, all processes.  [default: 256; v2: 128]")
@micro_batch
@click.option("--size", type=click.IntRange(64), help="Pixels, square.  [default: the teacher's]")
@click.option(
    "--start", type=click.Choice(["teacher", "random"]), default="teacher", help="The student's first weights."
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-5)
@of_the_schedule
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), default=0.9999)
@click.option("--task-weight", type=click.FloatRange(0), default=1.0, help="Of the noise itself.")
@click.option("--output-weight", type=click.FloatRange(0), default=1.0, help="Of the teacher's prediction.")
@click.option("--feature-weight", type=click.FloatRange(0), default=1.0, help="Of the teacher's features.")
@click.option(
    "--snr-gamma",
    type=click.FloatRange(0, min_open=True),
    help="Bound of the weights of timesteps, as in min-SNR.  [default: all weigh alike]",
)
@click.option("--flip/--no-flip", default=True, help="Mirror half of the pictures.")
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="torch.compile of the repeated blocks; with gradient checkpointing the teacher's alone.",
)
@click.option("--checkpoint-every", type=click.IntRange(1), default=5000, help="Steps.")
@of_the_run
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
    with errors_said():
        accelerator = open_accelerator(options["cpu"], options["mixed_precision"], output)
        teacher = load_teacher(row, options)
        try:
            config = DistillConfig(
                size=size or teacher.image_size,
                loop=LoopConfig(
                    batch_size=batch_size or (V2_BATCH if row.family == "v2" else 256),
                    fused=True,
                    **named(options, LOOP),
                ),
                weights=LossWeights(
                    task=options["task_weight"],
                    output=options["output_weight"],
                    feature=options["feature_weight"],
                    snr_gamma=options["snr_gamma"],
                ),
                **named(options, f"start compiled {RUN}"),
            )
            config.parts(accelerator.num_processes)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        material = open_material(folder, teacher, config, index=output / "index.json")
        made = run(config, teacher, row, material, output, accelerator)
    if accelerator.is_main_process:
        click.echo(made)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), required=True, help="Pictures, as distill takes them."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the cache.")
@click.option("--variant", type=click.Choice(STUDENTS), default="small", help="Of whose teacher, where none is named.")
@of_the_teacher
@click.option("--size", type=click.IntRange(64), help="Pixels, square.  [default: the teacher's]")
@click.option("--dtype", type=click.Choice(["fp16", "fp32"]), default="fp16", help="Of what is stored.")
@click.option("--flip/--no-flip", default=True, help="Mirrored pictures too.")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Pictures encoded at once.")
@click.option("--shard-size", type=click.IntRange(1), default=1024, help="Pictures a file.")
def cache(folder: Path, output: Path, variant: str, size: int | None, **options: Any) -> None:
    """Compute once what the frozen encoders give, so that distilling needs neither; run again after a kill to go on."""
    from bksdm_training.cache import build
    from bksdm_training.sources import open_source

    with errors_said():
        accelerator = open_accelerator(options["cpu"], "no", None)
        teacher = load_teacher(VARIANTS[variant], options)
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
            **named(options, "flip dtype batch_size shard_size workers skip_limit"),
        )
    if accelerator.is_main_process:
        click.echo(output)
