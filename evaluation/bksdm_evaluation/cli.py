"""`bksdm-eval`: how good are the pictures that a bundle or a checkpoint makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from bksdm_evaluation import gate_cli, generate_cli, score_cli
from bksdm_evaluation.figures_file import refuse_unwritable, versions, write_figures
from bksdm_evaluation.progress import bar

_PROGRAM = "bksdm-eval"


@click.group(context_settings={"max_content_width": 110})
@click.version_option(package_name="bksdm")
def commands() -> None:
    """Score what a bundle or a checkpoint generates."""
    # At its import diffusers reports which of several optimum distributions it picked: nothing for our users.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


@commands.command()
@click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR", help="[default: the demo model]")
@click.option("--data", "folder", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A split of it.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Captions, evenly spread.")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance-scale", type=float, help="[default: the model's own]")
@click.option("--seed", type=int, default=0, show_default=True, help="Caption number i uses seed + i.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(1))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON.")
def retrieval(
    bundle: Path | None,
    folder: Path,
    count: int,
    steps: int,
    guidance_scale: float | None,
    seed: int,
    batch_size: int,
    threads: int | None,
    output: Path | None,
) -> None:
    """Is the dataset picture nearest to a generated one its caption's own? Top-1 and top-5 shares.

    DIR is an image folder with metadata.jsonl, such as the `train` folder that bksdm-train data writes. Nearness is
    the cosine between features of a light ImageNet network.
    """
    from tqdm import tqdm

    from bksdm.packages import PACKAGES, PackageError
    from bksdm_evaluation.features import PACKAGE, features, load_network
    from bksdm_evaluation.generate import generate
    from bksdm_evaluation.retrieval import DatasetError, ScoreError, rank, read_dataset
    from bksdm_runtime import bundle as bundles
    from bksdm_runtime.engine import EngineSettings, MissingBackend
    from bksdm_runtime.pictures import USER_ERRORS, find_bundle
    from bksdm_runtime.pipeline import Pipeline

    if output is not None:
        refuse_unwritable(output)
    try:
        opened = bundles.load(find_bundle(bundle)[0])
        dataset = read_dataset(folder, opened.manifest.model.height)
        network = load_network()
        chosen = dataset.chosen(count)
        if guidance_scale is None:
            guidance_scale = opened.manifest.model.guidance_scale
        pipeline = Pipeline.open(opened, EngineSettings(threads=threads))
        captions = [dataset.captions[i] for i in chosen]
        with tqdm(total=len(chosen), unit="picture", dynamic_ncols=True, disable=None) as bar:
            pictures = generate(
                pipeline,
                captions,
                steps=steps,
                guidance_scale=guidance_scale,
                seed=seed,
                batch_size=batch_size,
                on_step=bar.update,
            )
        result = rank(features(network, pictures), features(network, dataset.pictures), chosen)
    except MissingBackend as error:
        raise click.UsageError(str(error)) from error
    except (*USER_ERRORS, DatasetError, ScoreError, PackageError, OSError) as error:
        raise click.ClickException(str(error)) from error
    figures = {
        "top1": result.top(1),
        "top5": result.top(5),
        "captions": len(chosen),
        "among": len(dataset.pictures),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "bundle": opened.sha256,
        # What repeats it: pixels may differ between backends, batches and numbers of threads.
        "dataset": dataset.sha256,
        "features": PACKAGES[PACKAGE].sha256,
        "backend": pipeline.backend,
        "arithmetic": pipeline.arithmetic,
        "batch_size": batch_size,
        "threads": pipeline.threads,
        "versions": versions("torch", "onnxruntime", "onnxruntime-gpu", "openvino"),
    }
    click.echo(
        f"top-1 {figures['top1']:.1%}, top-5 {figures['top5']:.1%} "
        f"of {len(chosen)} captions among {len(dataset.pictures)} pictures"
    )
    if output is not None:
        write_figures(output, figures)


@commands.command()
@click.argument("checkpoint")
@click.option(
    "--teacher", required=True, metavar="CHECKPOINT", help="What it was distilled from: draws the same noise."
)
@click.option("--data", "folder", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Of both splits.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Figures as JSON.")
@click.option("--unet", metavar="FOLDER", help="A trained U-Net, laid over CHECKPOINT.")
@click.option("--only", type=click.Choice(["train", "unseen"]), help="Score one split.  [default: both]")
@click.option("--count", type=click.IntRange(4), default=200, show_default=True, help="Captions of train, spread.")
@click.option("--steps", type=click.IntRange(1, 1000), default=25, show_default=True)
@click.option("--guidance-scale", type=click.FloatRange(1, 1000), help="Of both models.  [default: the teacher's own]")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Picture i uses seed + i.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--device", "kind", default="auto", show_default=True, help="auto: the GPU, if any.")
@click.option("--threads", type=click.IntRange(1))
@click.option(
    "--teacher-cache",
    "cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keeps the teacher's pictures and the dataset's features for the next student.",
)
@click.option("--grid", type=click.Path(path_type=Path), metavar="FILE", help="A PNG: teacher above student.")
def student(
    checkpoint: str,
    teacher: str,
    folder: Path,
    output: Path,
    unet: str | None,
    only: str | None,
    count: int,
    steps: int,
    guidance_scale: float | None,
    seed: int,
    batch_size: int,
    kind: str,
    threads: int | None,
    cache: Path | None,
    grid: Path | None,
) -> None:
    """KID, FID, LPIPS to the teacher, and caption retrieval of a student in training, without an export.

    CHECKPOINT is a folder in diffusers' layout, one .safetensors file, or `demo`. DIR holds the image folders `train`
    and `unseen`, as bksdm-train data writes them. Of train --count captions are drawn, of unseen all; they are scored
    against all pictures of their split. Both models draw from the same noise at the same settings.
    """
    import torch

    from bksdm import checkpoint as checkpoints
    from bksdm.checkpoint import CheckpointError
    from bksdm.errors import VariantError
    from bksdm.packages import PackageError
    from bksdm_evaluation import devices
    from bksdm_evaluation import student as students
    from bksdm_evaluation.grid import Band, save_grid
    from bksdm_evaluation.retrieval import DatasetError, ScoreError
    from bksdm_evaluation.statistics import TooFewPictures

    for path, option in ((output, "--output"), (grid, "--grid")):
        if path is not None:
            refuse_unwritable(path, option)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        device = devices.pick(kind)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error
    try:
        loaded = checkpoints.load(checkpoint, unet=unet)
        original = checkpoints.load(teacher)
        students.check_pair(loaded, original)
        if guidance_scale is None:
            guidance_scale = original.guidance_scale
        drawing = students.Drawing(steps, guidance_scale, seed, batch_size)
        splits = [
            students.read_split(folder, name, original.image_size, count if name == "train" else None)
            for name in students.SPLITS
            if only in (None, name)
        ]
        for model in (loaded, original):
            devices.move(model, device)
        networks = students.load_networks(device)
        scores = [students.score(loaded, original, split, drawing, networks, bar, cache) for split in splits]
        figures = {
            "student": students.describe(loaded),
            "teacher": students.describe(original),
            "splits": {one.split.name: one.figures() for one in scores},
            "note": students.NOTE,
            "settings": {
                "steps": steps,
                "guidance_scale": guidance_scale,
                "seed": seed,
                "count": count,
                "batch_size": batch_size,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": torch.get_num_threads(),
            },
            "networks": students.network_hashes(),
            "versions": versions("torch", "diffusers", "transformers"),
        }
        write_figures(output, figures)
        if grid is not None:
            bands = [
                Band(
                    [one.split.captions[i] for i in one.shown()],
                    [one.teacher[i] for i in one.shown()],
                    [one.student[i] for i in one.shown()],
                )
                for one in scores
            ]
            save_grid(bands, grid)
    except (
        CheckpointError,
        VariantError,
        DatasetError,
        ScoreError,
        TooFewPictures,
        PackageError,
        OSError,
    ) as error:
        raise click.ClickException(str(error)) from error
    for one in scores:
        click.echo(
            f"{one.split.name}: KID {one.kid.value:.4f} +- {one.kid.standard_error:.4f}, FID {one.fid:.1f}, "
            f"LPIPS to the teacher {one.lpips.mean():.3f}, top-1 {one.top1:.1%}, top-5 {one.top5:.1%} "
            f"({len(one.student)} captions, {len(one.split.dataset.pictures)} pictures)"
        )


for _command in (
    generate_cli.generate,
    score_cli.statistics,
    score_cli.score,
    gate_cli.compare,
    gate_cli.report,
):
    commands.add_command(_command)


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 misuse or a missing extra, 130 interrupted."""
    try:
        commands(standalone_mode=False, prog_name=_PROGRAM)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"{_PROGRAM}: {error.format_message()}", err=True)
        sys.exit(1)
    except click.Abort:
        click.echo(f"{_PROGRAM}: interrupted", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        click.echo(f"{_PROGRAM}: needs {error.name}: pip install 'bksdm[evaluation]'", err=True)
        sys.exit(2)
