"""`bksdm-eval generate`: captions to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bksdm_evaluation.progress import bar
from bksdm_evaluation.score_options import FOLDER, PROTOCOL_NAMES, device, errors

if TYPE_CHECKING:
    from bksdm_evaluation.artists import Artist


@click.command()
@click.option(
    "--captions", "file", type=FOLDER, required=True, metavar="FILE", help="COCO's .json, .csv, .jsonl, .txt."
)
@click.option("--count", type=click.IntRange(1), help="Draw so many of them.  [default: all; of COCO one a picture]")
@click.option("--draw-seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--bundle", type=FOLDER, metavar="DIR", help="What draws.  [default: the demo model]")
@click.option("--checkpoint", metavar="CHECKPOINT", help="Or a checkpoint in PyTorch: a folder, a file, or demo.")
@click.option("--unet", metavar="FOLDER", help="A trained U-Net, laid over --checkpoint.")
@click.option("--protocol", "name", type=click.Choice(PROTOCOL_NAMES), default="clean", show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=25, show_default=True)
@click.option("--guidance-scale", type=click.FloatRange(1, 1000), help="[default: the model's own]")
@click.option("--sampler", default="pndm", show_default=True, help="Of a bundle.")
@click.option("--seed", type=click.IntRange(0, 2**63), help="Of all noise.  [default: clean 0, published 1234]")
@click.option("--size", type=click.IntRange(32, 2048), default=256, show_default=True, help="Of the files, pixels.")
@click.option("--full", type=FOLDER, metavar="DIR", help="Keep the pictures at the model's own size here, too.")
@click.option(
    "--shard", default="auto", metavar="I/N", help="Part I, from 0, of N.  [default: as torchrun or Slurm say]"
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="Of a bundle.")
@click.option("--device", "kind", default="auto", show_default=True, help="Of --checkpoint.")
@click.option("--threads", type=click.IntRange(1))
@click.option("-o", "--output", type=FOLDER, required=True, metavar="DIR")
def generate(
    file: Path,
    count: int | None,
    draw_seed: int,
    bundle: Path | None,
    checkpoint: str | None,
    unet: str | None,
    name: str,
    steps: int,
    guidance_scale: float | None,
    sampler: str,
    seed: int | None,
    size: int,
    full: Path | None,
    shard: str,
    batch_size: int,
    backend: str,
    kind: str,
    threads: int | None,
    output: Path,
) -> None:
    """Draw a picture of every caption, to be scored.

    Killed and run again it goes on. Several processes, GPUs or machines share the work by --shard, into one folder or
    into a folder each: a picture is the same whatever is drawn beside it.
    """
    from bksdm_evaluation import generation
    from bksdm_evaluation.artists import Settings
    from bksdm_evaluation.captions import read_captions
    from bksdm_evaluation.protocol import PROTOCOLS
    from bksdm_evaluation.shards import read_shard
    from bksdm_runtime.engine import MissingBackend

    if checkpoint is not None and (bundle is not None or sampler != "pndm"):
        raise click.UsageError("--checkpoint is drawn by PyTorch, with pndm: leave out --bundle and --sampler")
    if unet is not None and checkpoint is None:
        raise click.UsageError("--unet is laid over a --checkpoint, and there is none")
    protocol = PROTOCOLS[name]
    try:
        part = read_shard(shard)
        captions = read_captions(file, count, draw_seed)
        artist = _artist(bundle, checkpoint, unet, backend, kind, threads)
        guidance = artist.guidance_scale if guidance_scale is None else guidance_scale
        settings = Settings(steps, guidance, sampler, batch_size)
        job = generation.Job(captions, settings, protocol, protocol.seed if seed is None else seed, size)
        total = len(generation.pending(job, part, output))
        with bar("drawing", total) as on_step:
            made = generation.generate(artist, job, output, part, full=full, on_step=on_step)
    except MissingBackend as error:
        raise click.UsageError(str(error)) from error
    except errors() as error:
        raise click.ClickException(str(error)) from error
    told = f"{made.made:,} pictures drawn, {made.found:,} were there; {protocol.name} protocol, {size} px"
    click.echo(told + (f"; {made.missing:,} of other shards are missing here" if made.missing else ""))
    click.echo(str(output))


def _artist(
    bundle: Path | None, checkpoint: str | None, unet: str | None, backend: str, kind: str, threads: int | None
) -> Artist:
    if checkpoint is None:
        from bksdm_evaluation.artists import BundleArtist
        from bksdm_runtime.engine import EngineSettings
        from bksdm_runtime.pictures import find_bundle
        from bksdm_runtime.pipeline import Pipeline

        return BundleArtist(Pipeline.open(find_bundle(bundle)[0], EngineSettings(backend, threads=threads)))
    from bksdm import checkpoint as checkpoints
    from bksdm_evaluation import devices
    from bksdm_evaluation.checkpoint_artist import CheckpointArtist

    loaded = checkpoints.load(checkpoint, unet=unet)
    devices.move(loaded, device(kind, threads))
    return CheckpointArtist(loaded)
