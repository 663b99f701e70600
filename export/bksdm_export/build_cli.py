"""`bksdm-build`: TensorRT engines of a bundle. Paths of their keys on stdout, table and progress on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from bksdm_export.profiles import Span
from bksdm_export.tensorrt_versions import HARDWARE_CHOICES
from bksdm_runtime.command import run as run_command
from bksdm_runtime.command import version_option
from bksdm_runtime.plans import LIBRARIES

if TYPE_CHECKING:
    from bksdm_export.builder_process import Progress
    from bksdm_export.to_tensorrt import Built

_PROGRAM = "bksdm-build"


class _SpanType(click.ParamType):
    name = "N or MIN:OPT:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Span:
        try:
            return value if isinstance(value, Span) else Span.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(context_settings={"max_content_width": 110})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--library", type=click.Choice(tuple(LIBRARIES)), help="[default: TensorRT if installed, else TensorRT-RTX]"
)
@click.option(
    "--sm", "sms", multiple=True, metavar="X.Y", help="Compute capability; again for more.  [default: the GPU's]"
)
@click.option("--component", "components", multiple=True, metavar="NAME", help="Build this one; again for more.")
@click.option(
    "--batch",
    "batches",
    type=_SpanType(),
    multiple=True,
    help="Pictures at once: one number, or the range and what to be fastest at.  [default: 1]",
)
@click.option(
    "--height", "heights", type=_SpanType(), multiple=True, help="Pixels, likewise.  [default: the model's own]"
)
@click.option(
    "--width", "widths", type=_SpanType(), multiple=True, help="Pixels.  Sizes given twice make two profiles."
)
@click.option("--unguided", is_flag=True, help="Profiles for --guidance-scale 1 and --guidance-interval too.")
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), metavar="N", help="0 to 5: how long to look for faster kernels."
)
@click.option("--workspace", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="Scratch memory at most.")
@click.option("--hardware", type=click.Choice(HARDWARE_CHOICES), help="Other GPUs that shall run it, too; slower.")
@click.option("--version-compatible", is_flag=True, help="Runs on later versions of TensorRT, too; slower.")
@click.option("--weight-streaming", is_flag=True, help="Weights may stay on the host: for GPUs with little memory.")
@click.option(
    "--strip", "stripped", is_flag=True, help="Leave the weights out; they are read from the graph when it is opened."
)
@click.option("--add", is_flag=True, help="Add the sizes to those of the engine that is there.")
@click.option("--force", is_flag=True, help="Build again what is there and fits.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@version_option(_PROGRAM)
def command(
    bundle: Path,
    library: str | None,
    sms: tuple[str, ...],
    components: tuple[str, ...],
    batches: tuple[Span, ...],
    heights: tuple[Span, ...],
    widths: tuple[Span, ...],
    unguided: bool,
    optimization_level: int | None,
    workspace: float | None,
    hardware: str | None,
    version_compatible: bool,
    weight_streaming: bool,
    stripped: bool,
    add: bool,
    force: bool,
    verbose: bool,
) -> int:
    """Build TensorRT engines of BUNDLE, for the GPU of this machine, beside its graphs.

    \b
    bksdm-build out/bk-sdm-small-fp16
    bksdm-build out/bk-sdm-small-fp16 --batch 1:2:8 --height 256:512:768 --width 256:512:768
    bksdm-build out/bk-sdm-small-fp16 --library tensorrt-rtx --sm 8.6 --sm 8.9
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=f"{_PROGRAM}: %(message)s")
    try:  # here and not above: --help must work whatever is installed
        import onnx  # noqa: F401

        from bksdm_export.errors import ExportError
        from bksdm_export.tensorrt_versions import MissingLibrary, Options
        from bksdm_export.to_tensorrt import BuildRequest, build_engines
        from bksdm_runtime.bundle import BundleError
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        click.echo(
            f"{_PROGRAM}: needs onnx: pip install 'bksdm[tensorrt,build]', or 'bksdm[tensorrt-rtx,build]'", err=True
        )
        return 2
    request = BuildRequest(
        bundle=bundle,
        library=library,
        sms=sms,
        components=components,
        batches=batches,
        heights=heights,
        widths=widths,
        unguided=unguided,
        add=add,
        options=Options(
            optimization_level=optimization_level,
            workspace=None if workspace is None else int(workspace * 2**30),
            hardware=hardware,
            version_compatible=version_compatible,
            weight_streaming=weight_streaming,
            stripped=stripped,
        ),
        force=force,
    )
    try:
        with shown() as progress:
            built = build_engines(request, progress)
    except MissingLibrary as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 2
    except (ExportError, BundleError) as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 1
    click.echo(table(built), err=True)
    for one in built:
        click.echo(str(one.plan.path.parent / f"{one.plan.key.component}.json"))
    return 0


class shown(AbstractContextManager["Callable[[Progress], None]"]):  # noqa: N801 - reads as what it does
    """Progress on stderr: a bar of the phase under way on a terminal, elsewhere a line where a component begins."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._component = ""
        self._started = time.perf_counter()

    def __enter__(self) -> Callable[[Progress], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, progress: Progress) -> None:
        if not sys.stderr.isatty():
            if progress.component != self._component or progress.phase == "starting":
                click.echo(f"[{time.perf_counter() - self._started:6.1f} s] {progress.component}: building", err=True)
            self._component = progress.component
            return
        if self._bar is None or progress.component != self._component:
            if self._bar is not None:
                self._bar.close()
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}"
            self._bar = tqdm(total=1, bar_format=layout, leave=False, file=sys.stderr)
            self._component = progress.component
        self._bar.set_description_str(f"{progress.component}: {progress.phase[:40]:40}", refresh=False)
        self._bar.total, self._bar.n = progress.steps or 1, progress.step
        self._bar.refresh()


def table(built: Sequence[Built]) -> str:
    """What is there now: for each engine its GPU, shapes, size, and what building it took."""
    rows = [("engine", "for", "shapes", "nodes fp16 + fp32", "MB", "seconds", "peak GB, host", "error")]
    for one in built:
        key = one.plan.key
        first = next(iter(key.profiles[0]))
        rows.append(
            (
                key.component,
                str(key.machine),
                ", ".join(str(profile[first]) for profile in key.profiles),
                f"{one.types.float16:,} + {one.types.float32:,}",
                f"{one.plan.bytes / 1e6:.1f}",
                f"{one.plan.seconds:.1f}" if one.fresh else "was there",
                f"{one.plan.peak_bytes / 1e9:.2f}" if one.fresh else "",
                "not compared" if one.error is None else f"{one.error:.1e}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command as a function, from arguments (None: the process's own) to its exit code."""
    return run_command(command, _PROGRAM, arguments)


def main() -> None:
    sys.exit(run())
