"""`bksdm-eval`: how good are the pictures that a bundle makes."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

_PROGRAM = "bksdm-eval"


@click.group(context_settings={"max_content_width": 110})
@click.version_option(package_name="bksdm")
def commands() -> None:
    """Score what a bundle generates."""
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
    from bksdm_runtime.engine import MissingBackend
    from bksdm_runtime.pictures import USER_ERRORS, find_bundle
    from bksdm_runtime.pipeline import Pipeline

    if output is not None:
        _refuse_unwritable(output)
    try:
        opened = bundles.load(find_bundle(bundle)[0])
        dataset = read_dataset(folder, opened.manifest.model.height)
        network = load_network()
        chosen = dataset.chosen(count)
        if guidance_scale is None:
            guidance_scale = opened.manifest.model.guidance_scale
        pipeline = Pipeline.open(opened, threads=threads)
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
        "batch_size": batch_size,
        "threads": pipeline.threads,
        "versions": _versions(),
    }
    click.echo(
        f"top-1 {figures['top1']:.1%}, top-5 {figures['top5']:.1%} "
        f"of {len(chosen)} captions among {len(dataset.pictures)} pictures"
    )
    if output is not None:
        try:
            _write(output, json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise click.ClickException(f"{output} cannot be written: {error.strerror or error}") from error


def _versions() -> dict[str, str]:
    found = {}
    for package in ("bksdm", "numpy", "pillow", "torch", "onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):  # one of the two onnxruntimes
            found[package] = version(package)
    return found


def _refuse_unwritable(output: Path) -> None:
    """Notice before minutes of work that the result could not be written."""
    if output.is_dir():
        raise click.BadParameter(f"{output} is a folder, not a file", param_hint="--output")
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output.parent} is not a folder", param_hint="--output")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{output.parent} cannot be written", param_hint="--output")


def _write(output: Path, text: str) -> None:
    """The whole file or the one that was there."""
    staging = output.with_name(f".{output.name}")
    staging.write_text(text)
    staging.replace(output)


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
