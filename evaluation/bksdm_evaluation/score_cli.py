"""`bksdm-eval generate`, `statistics` and `score`: captions to pictures, pictures to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bksdm_evaluation.figures_file import refuse_unwritable, versions, write_figures
from bksdm_evaluation.progress import bar

if TYPE_CHECKING:
    import torch

    from bksdm_evaluation.artists import Artist
    from bksdm_evaluation.feature_set import FeatureSet
    from bksdm_evaluation.picture_sets import PictureSet
    from bksdm_evaluation.protocol import Protocol

_PROTOCOLS = ("clean", "published")
_METRICS = ("fid", "kid", "is", "clip")
_FOLDER = click.Path(path_type=Path)
_LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino")


def _errors() -> tuple[type[Exception], ...]:
    """What a user can cause: one sentence each."""
    from bksdm.checkpoint import CheckpointError
    from bksdm.errors import VariantError
    from bksdm.packages import PackageError
    from bksdm_evaluation.captions import CaptionsError
    from bksdm_evaluation.clip_score import ClipError
    from bksdm_evaluation.feature_set import FeatureSetError
    from bksdm_evaluation.generation import GenerationError
    from bksdm_evaluation.picture_files import PicturesError
    from bksdm_evaluation.retrieval import ScoreError
    from bksdm_evaluation.shards import ShardError
    from bksdm_evaluation.statistics import TooFewPictures
    from bksdm_runtime.pictures import USER_ERRORS

    of_models = (CheckpointError, VariantError, PackageError, ClipError, *USER_ERRORS)
    of_pictures = (
        CaptionsError,
        FeatureSetError,
        GenerationError,
        PicturesError,
        ScoreError,
        ShardError,
        TooFewPictures,
    )
    return (*of_models, *of_pictures, OSError)


@click.command()
@click.option(
    "--captions", "file", type=_FOLDER, required=True, metavar="FILE", help="COCO's .json, .csv, .jsonl, .txt."
)
@click.option("--count", type=click.IntRange(1), help="Draw so many of them.  [default: all; of COCO one a picture]")
@click.option("--draw-seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--bundle", type=_FOLDER, metavar="DIR", help="What draws.  [default: the demo model]")
@click.option("--checkpoint", metavar="CHECKPOINT", help="Or a checkpoint in PyTorch: a folder, a file, or demo.")
@click.option("--unet", metavar="FOLDER", help="A trained U-Net, laid over --checkpoint.")
@click.option("--protocol", "name", type=click.Choice(_PROTOCOLS), default="clean", show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=25, show_default=True)
@click.option("--guidance-scale", type=click.FloatRange(1, 1000), help="[default: the model's own]")
@click.option("--sampler", default="pndm", show_default=True, help="Of a bundle.")
@click.option("--seed", type=click.IntRange(0, 2**63), help="Of all noise.  [default: clean 0, published 1234]")
@click.option("--size", type=click.IntRange(32, 2048), default=256, show_default=True, help="Of the files, pixels.")
@click.option("--full", type=_FOLDER, metavar="DIR", help="Keep the pictures at the model's own size here, too.")
@click.option(
    "--shard", default="auto", metavar="I/N", help="Part I, from 0, of N.  [default: as torchrun or Slurm say]"
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="Of a bundle.")
@click.option("--device", "kind", default="auto", show_default=True, help="Of --checkpoint.")
@click.option("--threads", type=click.IntRange(1))
@click.option("-o", "--output", type=_FOLDER, required=True, metavar="DIR")
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
    except _errors() as error:
        raise click.ClickException(str(error)) from error
    told = f"{made.made:,} pictures drawn, {made.found:,} were there; {protocol.name} protocol, {size} px"
    click.echo(told + (f"; {made.missing:,} of other shards are missing here" if made.missing else ""))
    click.echo(str(output))


def _artist(
    bundle: Path | None, checkpoint: str | None, unet: str | None, backend: str, kind: str, threads: int | None
) -> Artist:
    from bksdm_evaluation.artists import BundleArtist, CheckpointArtist

    if checkpoint is None:
        from bksdm_runtime.engine import EngineSettings
        from bksdm_runtime.pictures import find_bundle
        from bksdm_runtime.pipeline import Pipeline

        return BundleArtist(Pipeline.open(find_bundle(bundle)[0], EngineSettings(backend, threads=threads)))
    from bksdm import checkpoint as checkpoints
    from bksdm_evaluation import devices

    device = _device(kind, threads)
    loaded = checkpoints.load(checkpoint, unet=unet)
    devices.move(loaded, device)
    return CheckpointArtist(loaded)


def _device(kind: str, threads: int | None) -> torch.device:
    import torch

    from bksdm_evaluation import devices

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return devices.pick(kind)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error


def _passing(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every pass over pictures."""
    for option in reversed(
        [
            click.option(
                "--size", type=click.IntRange(32, 2048), default=256, show_default=True, help="Pixels, square."
            ),
            click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True),
            click.option("--device", "kind", default="auto", show_default=True, help="auto: the GPU, if any."),
            click.option("--threads", type=click.IntRange(1), help="That read pictures ahead."),
        ]
    ):
        command = option(command)
    return command


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=_FOLDER)
@click.option("--protocol", "name", type=click.Choice(_PROTOCOLS), default="clean", show_default=True)
@click.option("--shard", default="0/1", show_default=True, metavar="I/N", help="Part I, from 0, of N.")
@_passing
@click.option("-o", "--output", type=_FOLDER, required=True, metavar="FILE.npz")
def statistics(
    pictures: Sequence[Path],
    name: str,
    shard: str,
    size: int,
    batch_size: int,
    kind: str,
    threads: int | None,
    output: Path,
) -> None:
    """Statistics of real PICTURES (folders), once for all scores against them.

    The file is pytorch-fid's, with what else scores need. Files of shards are given to `score` together.
    """
    from bksdm_evaluation import inception, picture_sets
    from bksdm_evaluation.protocol import PROTOCOLS
    from bksdm_evaluation.shards import read_shard

    if output.suffix != ".npz":
        raise click.BadParameter(f"{output} must end in .npz", param_hint="--output")
    refuse_unwritable(output)
    device = _device(kind, None)
    try:
        part = read_shard(shard)
        whole = picture_sets.real(pictures, PROTOCOLS[name], size)
        network = inception.load_network().to(device)
        found = _features(whole.part(part), network, batch_size, threads)
        found.save(output)
    except _errors() as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{found.count:,} pictures, {name} protocol, {size} px")
    click.echo(str(output))


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=_FOLDER)
@click.option(
    "--reference", type=_FOLDER, multiple=True, metavar="PATH", help="Real pictures, or their .npz; again for more."
)
@click.option("--metrics", metavar="LIST", help="Of fid, kid, is, clip.  [default: kid, and fid of enough pictures]")
@click.option("--protocol", "name", type=click.Choice(_PROTOCOLS), help="[default: the pictures' own, else clean]")
@click.option("--captions", "file", type=_FOLDER, metavar="FILE", help="Of the pictures.  [default: their own listing]")
@click.option("--clip-model", metavar="PATH", help="[default: ViT-g/14 laion2b_s34b_b88k, as published]")
@click.option("--allow-biased", is_flag=True, help="FID of fewer pictures than features.")
@click.option("--allow-missing", is_flag=True, help="Score the pictures that are there.")
@click.option("--label", help="What `report` calls it.  [default: the variant]")
@click.option("--iteration", type=click.IntRange(0), help="Of the training, for `report`.")
@click.option("--latency", type=click.FloatRange(0, min_open=True), help="Seconds a picture took, for `report`.")
@_passing
@click.option("-o", "--output", type=_FOLDER, metavar="FILE", help="Write the scores as JSON.")
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
    if output is not None:
        refuse_unwritable(output)
    device = _device(kind, None)
    try:
        found = picture_sets.generated(pictures, name, size)
        captions = picture_sets.captions_of(found, file)
        if captions and not allow_missing:
            found.refuse_missing(captions)
        networks = scores.load_networks(wanted, device, clip_model)
        with bar("pictures", len(found.files)) as on_progress:
            measured = scores.measure(
                found, networks, captions, threads=threads, batch_size=batch_size, on_progress=on_progress
            )
        against = _reference(reference, found.protocol, size, networks.inception, batch_size, threads)
        figures = scores.figures(measured, against, allow_biased=allow_biased, asked=metrics is not None)
    except _errors() as error:
        raise click.ClickException(str(error)) from error
    click.echo(scores.told(figures))
    if output is not None:
        settings = {"batch_size": batch_size, "device": device.type}
        for_report = {"label": label, "iteration": iteration, "latency": latency}
        more = {**for_report, "settings": settings, "versions": versions(*_LIBRARIES)}
        write_figures(output, {**figures, **more})


@click.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@click.option(
    "--reference", type=_FOLDER, multiple=True, metavar="PATH", help="Real pictures or .npz: KID and FID, too."
)
@click.option(
    "--captions", "file", type=_FOLDER, metavar="FILE", help="For --clip-model.  [default: their own listing]"
)
@click.option("--clip-model", metavar="PATH", help="The CLIP score, too, by this network.")
@click.option("--min-psnr", type=float, help="dB, on average.  [default: 28]")
@click.option("--max-lpips", type=float, help="On average.  [default: 0.06]")
@click.option("--max-drift", type=click.FloatRange(0, 1), help="Share.  [default: 0.002]")
@_passing
@click.option("-o", "--output", type=_FOLDER, metavar="FILE", help="Write the verdict as JSON.")
def compare(
    a: Path,
    b: Path,
    reference: Sequence[Path],
    file: Path | None,
    clip_model: str | None,
    min_psnr: float | None,
    max_lpips: float | None,
    max_drift: float | None,
    size: int,
    batch_size: int,
    kind: str,
    threads: int | None,
    output: Path | None,
) -> None:
    """Does B, an engine's pictures, pass beside A, PyTorch's? Exit 1 where it does not.

    A and B are folders of `generate`, of the same captions and noise. Asked are PSNR and LPIPS of every pair, whether
    all pictures move the same way (brightness, contrast, sharpness, saturation), and by how much scores differ.
    """
    from dataclasses import replace

    from bksdm.perceptual import Lpips
    from bksdm_evaluation import comparison, gate, intervals, picture_sets, scores

    if output is not None:
        refuse_unwritable(output)
    device = _device(kind, None)
    given = {"psnr": min_psnr, "lpips": max_lpips, "drift": max_drift}
    bounds = replace(gate.Bounds(), **{name: value for name, value in given.items() if value is not None})
    try:
        first, second = (picture_sets.generated([folder], None, size) for folder in (a, b))
        captions = picture_sets.captions_of(first, file)
        wanted = (*(("kid", "fid") if reference else ()), *(("clip",) if clip_model else ()))
        networks = scores.load_networks(wanted, device, clip_model)
        lpips = Lpips().to(device)
        with bar("pairs", len(first.files)) as on_progress:
            compared = comparison.compare(
                *(first, second, lpips, networks, captions),
                threads=threads,
                batch_size=batch_size,
                on_progress=on_progress,
            )
        against = _reference(reference, first.protocol, size, networks.inception, batch_size, threads)
        found = gate.figures(
            compared.pairs,
            gate.drifts(compared.pairs, intervals.of_mean),
            comparison.differences_of_scores(compared, against),
            bounds,
        )
    except _errors() as error:
        raise click.ClickException(str(error)) from error
    said = {"protocol": first.protocol.name, "size": size, "folders": [str(a), str(b)]}
    said |= {"a": first.generation, "b": second.generation}
    if output is not None:
        write_figures(output, {**said, **found, "versions": versions(*_LIBRARIES)})
    click.echo(gate.told(found))
    click.echo(
        f"{first.protocol.name} protocol, {size} px, {found['pairs']:,} pairs: {'passed' * found['passed'] or 'FAILED'}"
    )
    if not found["passed"]:
        failed = [one["what"] for one in found["questions"] if one["passed"] is False]
        raise click.ClickException(f"{b} does not pass beside {a}: {', '.join(failed)}")


def _wanted(metrics: str | None, reference: Sequence[Path]) -> tuple[str, ...]:
    wanted = tuple(metrics.replace(" ", "").split(",")) if metrics is not None else ("kid", "fid")
    for one in wanted:
        if one not in _METRICS:
            raise click.BadParameter(f"{one!r} is no metric: choose of {', '.join(_METRICS)}", param_hint="--metrics")
    if {"fid", "kid"} & set(wanted) and not reference:
        raise click.UsageError("FID and KID are distances to real pictures: give --reference, or other --metrics")
    return wanted


def _reference(
    paths: Sequence[Path], protocol: Protocol, size: int, network: Any, batch_size: int, threads: int | None
) -> FeatureSet | None:
    """Statistics of all paths together; None for none."""
    from bksdm_evaluation import feature_set, picture_sets
    from bksdm_evaluation.scoring import said_of_features

    said = said_of_features(protocol, size)
    sets = [feature_set.load(path, said) for path in paths if path.suffix == ".npz"]
    if folders := [path for path in paths if path.suffix != ".npz"]:
        sets.append(_features(picture_sets.real(folders, protocol, size), network, batch_size, threads))
    if not sets:
        return None
    whole = sets[0]
    for other in sets[1:]:
        whole = whole + other
    return whole


def _features(pictures: PictureSet, network: Any, batch_size: int, threads: int | None) -> FeatureSet:
    from bksdm_evaluation.scoring import FeatureMeter, run

    meter = FeatureMeter(network, pictures.protocol)
    with bar("real pictures", len(pictures.files)) as on_progress:
        run(pictures.source, [meter], threads=threads, batch_size=batch_size, on_progress=on_progress)
    return meter.result(pictures.size)


@click.command()
@click.argument("results", nargs=-1, required=True, type=_FOLDER)
@click.option("-o", "--output", type=_FOLDER, required=True, metavar="FILE.html")
def report(results: Sequence[Path], output: Path) -> None:
    """One self-contained page of RESULTS, the JSON files of `score` and `compare`, beside the published scores."""
    from bksdm_evaluation.generation import write_whole
    from bksdm_evaluation.report import ReportError, page

    refuse_unwritable(output)
    try:
        write_whole(output, page(results).encode())
    except (ReportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(output))


COMMANDS = (generate, statistics, score, compare, report)
