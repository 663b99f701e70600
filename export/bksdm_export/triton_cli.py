"""`bksdm-triton`: a model repository for Triton Inference Server. Its path on stdout, progress on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bksdm_runtime.command import run as run_command
from bksdm_runtime.command import version_option
from bksdm_runtime.engine import BACKENDS, EngineError, EngineSettings, MissingBackend

_PROGRAM = "bksdm-triton"


class _SizeType(click.ParamType):
    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        from bksdm_runtime.served_request import LimitsError, read_size

        try:
            return value if isinstance(value, tuple) else read_size(value)
        except LimitsError as error:
            self.fail(str(error), param, ctx)


@click.command(context_settings={"max_content_width": 110})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The repository.")
@click.option(
    "--size",
    "sizes",
    type=_SizeType(),
    multiple=True,
    help="Of the pictures that are served; again for more, the default first.  [default: the model's own]",
)
@click.option(
    "--max-steps", type=click.IntRange(1, 1000), default=100, show_default=True, help="The most that is served."
)
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=25, show_default=True, help="Of requests that do not say."
)
@click.option(
    "--slots", type=click.IntRange(1, 256), default=8, show_default=True, help="Pictures that are drawn at once."
)
@click.option(
    "--fronts",
    type=click.IntRange(1, 256),
    default=12,
    show_default=True,
    help="Clients that may wait over HTTP or unary gRPC; keep it over --slots.",
)
@click.option(
    "--max-queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait for a slot."
)
@click.option(
    "--queue-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long one may wait.",
)
@click.option(
    "--backend", type=click.Choice(("auto", *BACKENDS)), default="auto", show_default=True, help="Of the server."
)
@click.option("--threads", type=click.IntRange(min=1), help="Of the server.  [default: one per core]")
@click.option(
    "--layout",
    type=click.Choice(("core", "bls")),
    default="core",
    show_default=True,
    help="bls: text encoder, U-Net and decoder as plain models of Triton's tensorrt or onnxruntime backend, the loop "
    "in Python; no shared evaluations, no stream. Those backends have not run it yet.",
)
@click.option("--engines", metavar="NAME", help="Of --layout bls: which folder of the bundle's engines/.")
@click.option("--link", is_flag=True, help="Hard links to the bundle's files, not copies.")
@click.option("--force", is_flag=True, help="Replace a repository that is there.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@version_option(_PROGRAM)
def command(
    bundle: Path,
    output: Path,
    sizes: tuple[tuple[int, int], ...],
    max_steps: int,
    steps: int,
    slots: int,
    fronts: int,
    max_queue: int,
    queue_seconds: float,
    backend: str,
    threads: int | None,
    layout: str,
    engines: str | None,
    link: bool,
    force: bool,
    verbose: bool,
) -> int:
    """Write a model repository that serves BUNDLE on Triton Inference Server.

    \b
    bksdm-triton out/bk-sdm-small -o models
    bksdm-triton out/bk-sdm-small-fp16 -o models --size 512x512 --size 768x512 --slots 16 --fronts 24
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=f"{_PROGRAM}: %(message)s")
    from bksdm_export.errors import ExportError
    from bksdm_export.triton_repository import RepositoryRequest, write_repository
    from bksdm_runtime.bundle import BundleError

    if engines is not None and layout != "bls":
        raise click.UsageError("--engines is of --layout bls; the core takes those that fit its machine")
    started = time.perf_counter()

    def progress(stage: str) -> None:
        click.echo(f"[{time.perf_counter() - started:6.1f} s] {stage}", err=True)

    request = RepositoryRequest(
        bundle=bundle,
        output=output,
        sizes=sizes,
        max_steps=max_steps,
        steps=steps,
        slots=slots,
        fronts=fronts,
        max_queue=max_queue,
        queue_seconds=queue_seconds,
        backend=backend,
        threads=threads or 0,
        layout=layout,
        engines=engines,
        link=link,
        force=force,
        settings=EngineSettings(threads=threads),
    )
    try:
        preview = write_repository(request, progress)
    except MissingBackend as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 2
    except (ExportError, BundleError, EngineError) as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 1
    if preview is not None:
        click.echo(
            f"previews: {preview.psnr:.1f} dB of the decoder's pictures, on {preview.pictures} not fitted", err=True
        )
    click.echo(str(output))
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """The command as a function, from arguments (None: the process's own) to its exit code."""
    return run_command(command, _PROGRAM, arguments)


def main() -> None:
    sys.exit(run())
