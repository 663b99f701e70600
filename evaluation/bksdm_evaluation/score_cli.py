"""`bksdm-eval statistics` and `score`: pictures to scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from bksdm_evaluation.figures_file import refuse_unwritable, versions, write_figures
from bksdm_evaluation.progress import bar
from bksdm_evaluation.score_options import (
    FOLDER,
    LIBRARIES,
    PROTOCOL_NAMES,
    device,
    errors,
    features,
    inception,
    passing,
    reference_of,
)

_METRICS = ("fid", "kid", "is", "clip")


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=FOLDER)
@click.option("--protocol", "name", type=click.Choice(PROTOCOL_NAMES), default="clean", show_default=True)
@click.option("--shard", default="0/1", show_default=True, metavar="I/N", help="Part I, from 0, of N.")
@inception
@passing
@click.option("-o", "--output", type=FOLDER, required=True, metavar="FILE.npz")
def statistics(
    pictures: Sequence[Path],
    name: str,
    shard: str,
    weights: Path | None,
    size: int,
    batch_size: int,
    kind: str,
    threads: int | None,
    output: Path,
) -> None:
    """Statistics of real PICTURES (folders), once for all scores against them.

    The file is pytorch-fid's, with what else scores need. Files of shards are given to `score` together.
    """
    from bksdm_evaluation import picture_sets, scores
    from bksdm_evaluation.protocol import PROTOCOLS
    from bksdm_evaluation.shards import read_shard

    if output.suffix != ".npz":
        raise click.BadParameter(f"{output} must end in .npz", param_hint="--output")
    refuse_unwritable(output)
    where = device(kind, None)
    try:
        part = read_shard(shard)
        whole = picture_sets.real(pictures, PROTOCOLS[name], size)
        network = scores.load_networks(("fid",), where, None, weights).inception
        found = features(whole.part(part), network, batch_size, threads)
        found.save(output)
    except errors() as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{found.count:,} pictures, {name} protocol, {size} px")
    click.echo(str(output))


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--reference", type=FOLDER, multiple=True, metavar="PATH", help="Real pictures, or their .npz; again for more."
)
@click.option("--metrics", metavar="LIST", help="Of fid, kid, is, clip.  [default: kid, and fid of enough pictures]")
@click.option("--protocol", "name", type=click.Choice(PROTOCOL_NAMES), help="[default: the pictures' own, else clean]")
@click.option("--captions", "file", type=FOLDER, metavar="FILE", help="Of the pictures.  [default: their own listing]")
@click.option("--clip-model", metavar="PATH", help="[default: ViT-g/14 laion2b_s34b_b88k, as published]")
@click.option("--allow-biased", is_flag=True, help="FID of fewer pictures than features.")
@click.option("--allow-missing", is_flag=True, help="Score the pictures that are there.")
@click.option("--label", help="What `report` calls it.  [default: the variant]")
@click.option("--iteration", type=click.IntRange(0), help="Of the training, for `report`.")
@click.option("--latency", type=click.FloatRange(0, min_open=True), help="Seconds a picture took, for `report`.")
@inception
@passing
@click.option("-o", "--output", type=FOLDER, metavar="FILE", help="Write the scores as JSON.")
def score(
    pictures: Sequence[Path],
    reference: Sequence[Path],
    metrics: str | None,
    name: str | None,
    file: Path | None,
    clip_model: str | None,
    allow_biased: bool,
    allow_missing: bool,
    label: str | None,
    iteration: int | None,
    latency: float | None,
    weights: Path | None,
    size: int,
    batch_size: int,
    kind: str,
    threads: int | None,
    output: Path | None,
) -> None:
    """Score generated PICTURES: folders, which are shards of one job, as `generate` writes them or any others.

    FID and KID are taken against --reference, the Inception score and the CLIP score need none. Everything is computed
    in one pass. No score is printed without its protocol.
    """
    from bksdm_evaluation import picture_sets, scores

    wanted = _wanted(metrics, reference)
    if weights is not None and not {"fid", "kid", "is"} & set(wanted):
        raise click.UsageError(f"--inception is of fid, kid and is, and asked is {metrics}: leave it out")
    if output is not None:
        refuse_unwritable(output)
    where = device(kind, None)
    try:
        found = picture_sets.generated(pictures, name, size)
        captions = picture_sets.captions_of(found, file)
        if captions and not allow_missing:
            found.refuse_missing(captions)
        networks = scores.load_networks(wanted, where, clip_model, weights)
        with bar("pictures", len(found.files)) as on_progress:
            measured = scores.measure(
                found, networks, captions, threads=threads, batch_size=batch_size, on_progress=on_progress
            )
        against = reference_of(reference, found.protocol, size, networks.inception, batch_size, threads)
        figures = scores.figures(measured, against, allow_biased=allow_biased, asked=metrics is not None)
    except errors() as error:
        raise click.ClickException(str(error)) from error
    click.echo(scores.told(figures))
    if output is not None:
        settings = {"batch_size": batch_size, "device": where.type}
        for_report = {"label": label, "iteration": iteration, "latency": latency}
        more = {**for_report, "settings": settings, "versions": versions(*LIBRARIES)}
        write_figures(output, {**figures, **more})


def _wanted(metrics: str | None, reference: Sequence[Path]) -> tuple[str, ...]:
    wanted = tuple(metrics.replace(" ", "").split(",")) if metrics is not None else ("kid", "fid")
    for one in wanted:
        if one not in _METRICS:
            raise click.BadParameter(f"{one!r} is no metric: choose of {', '.join(_METRICS)}", param_hint="--metrics")
    if {"fid", "kid"} & set(wanted) and not reference:
        raise click.UsageError("FID and KID are distances to real pictures: give --reference, or other --metrics")
    if reference and not {"fid", "kid"} & set(wanted):
        raise click.UsageError(f"--reference is of fid and kid, and asked is {metrics}: leave it out")
    return wanted
