"""`bksdm-eval compare` and `report`: a verdict on an engine, and a page of all results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from bksdm_evaluation.figures_file import refuse_unwritable, versions, write_figures
from bksdm_evaluation.progress import bar
from bksdm_evaluation.score_options import FOLDER, LIBRARIES, device, errors, inception, passing, reference_of


@click.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option(
    "--reference", type=FOLDER, multiple=True, metavar="PATH", help="Real pictures or .npz: KID and FID, too."
)
@click.option("--captions", "file", type=FOLDER, metavar="FILE", help="For --clip-model.  [default: their own listing]")
@click.option("--clip-model", metavar="PATH", help="The CLIP score, too, by this network.")
@click.option("--inception-score", is_flag=True, help="The Inception score, too, by --inception or torch-fidelity.")
@click.option("--min-psnr", type=float, help="dB, on average.  [default: 28]")
@click.option("--max-lpips", type=float, help="On average.  [default: 0.06]")
@click.option("--max-drift", type=click.FloatRange(0, 1), help="Share.  [default: 0.002]")
@inception
@passing
@click.option("-o", "--output", type=FOLDER, metavar="FILE", help="Write the verdict as JSON.")
def compare(
    a: Path,
    b: Path,
    reference: Sequence[Path],
    file: Path | None,
    clip_model: str | None,
    inception_score: bool,
    min_psnr: float | None,
    max_lpips: float | None,
    max_drift: float | None,
    weights: Path | None,
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
    from bksdm_evaluation import comparison, gate, picture_sets, scores

    if weights is not None and not (reference or inception_score):
        raise click.UsageError(
            "--inception is of --reference and of --inception-score, and neither is asked: leave it out"
        )
    if output is not None:
        refuse_unwritable(output)
    where = device(kind, None)
    given = {"psnr": min_psnr, "lpips": max_lpips, "drift": max_drift}
    bounds = replace(gate.Bounds(), **{name: value for name, value in given.items() if value is not None})
    try:
        first, second = (picture_sets.generated([folder], None, size) for folder in (a, b))
        captions = picture_sets.captions_of(first, file)
        wanted = (*(("kid", "fid") if reference else ()), *(("clip",) if clip_model else ()))
        wanted = (*wanted, *(("is",) if inception_score else ()))
        networks = scores.load_networks(wanted, where, clip_model, weights)
        lpips = Lpips().to(where)
        with bar("pairs", len(first.files)) as on_progress:
            compared = comparison.compare(
                *(first, second, lpips, networks, captions),
                threads=threads,
                batch_size=batch_size,
                on_progress=on_progress,
            )
        against = reference_of(reference, first.protocol, size, networks.inception, batch_size, threads)
        found = gate.figures(
            compared.pairs,
            gate.drifts(compared.pairs),
            comparison.differences_of_scores(compared, against),
            bounds,
        )
    except errors() as error:
        raise click.ClickException(str(error)) from error
    said = {"protocol": first.protocol.name, "size": size, "folders": [str(a), str(b)]}
    said |= {"a": first.generation, "b": second.generation}
    if networks.classes is not None:
        said["classes_network"] = networks.classes.network
    if output is not None:
        write_figures(output, {**said, **found, "versions": versions(*LIBRARIES)})
    click.echo(gate.told(found))
    click.echo(
        f"{first.protocol.name} protocol, {size} px, {found['pairs']:,} pairs: {'passed' * found['passed'] or 'FAILED'}"
    )
    if not found["passed"]:
        failed = [one["what"] for one in found["questions"] if one["passed"] is False]
        raise click.ClickException(f"{b} does not pass beside {a}: {', '.join(failed)}")


@click.command()
@click.argument("results", nargs=-1, required=True, type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, metavar="FILE.html")
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
