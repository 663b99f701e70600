"""bksdm-train: the group of its commands, and those of the demo data and its teacher."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from bksdm_training.distill_command import cache, distill
from bksdm_training.lora_command import lora
from bksdm_training.options import errors_said

EXTRA = "training"


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
    with errors_said():
        made = train_teacher(config, folder, output, device, init=init)
    click.echo(made)


def _choices(option: str, given: str, valid: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in given.split(","))
    for part in chosen:
        if part not in valid:
            raise click.BadParameter(f"{part!r} is unknown: choose from {', '.join(valid)}", param_hint=option)
    return chosen


for _command in (cache, distill, lora):
    commands.add_command(_command)


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
