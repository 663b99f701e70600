"""`bksdm-run`: a prompt becomes a picture. Paths on stdout, progress and notices on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click

from bksdm_runtime.command import run as run_command
from bksdm_runtime.compiled_cache import user_folder
from bksdm_runtime.engine import ARITHMETICS, BACKENDS, EngineSettings, MissingBackend
from bksdm_runtime.request import NOISES, SEED_MAX, SEED_MIN, Request
from bksdm_runtime.schedule import SAMPLERS
from bksdm_runtime.version import version

_PROGRAM = "bksdm-run"
_FROM_PNG_TAKES = (
    "from_png",
    "bundle",
    "output",
    "backend",
    "threads",
    "arithmetic",
    "pinning",
    "compiled_cache",
    "verbose",
)


class _StdoutError(Exception):
    """Standard output cannot be written; the cause is the OSError."""


def _print(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        raise _StdoutError from error


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        _print(f"{_PROGRAM} {version()}")
        context.exit()


def _print_help(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        _print(context.get_help())
        context.exit()


@click.command(context_settings={"max_content_width": 110}, add_help_option=False)
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option("--prompts-file", metavar="FILE", help="One prompt a line ('-' reads them from stdin).")
@click.option(
    "--from-png", type=click.Path(path_type=Path), metavar="PICTURE", help="Make a picture again from what it carries."
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model, as bksdm-export writes it.  [default: $BKSDM_BUNDLE, else the demo model]",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Picture to write (replaced if it exists), a folder, or a template with {prompt} {seed} {index} {n}.  "
    "[default: {prompt}-{seed}.png]",
)
@click.option("--negative-prompt", default="", metavar="TEXT", help="What the picture should not show.")
@click.option("--steps", type=int, metavar="N", default=25, show_default=True)
@click.option(
    "--guidance-scale", type=float, metavar="X", help="1 is none, at half the work.  [default: the model's own]"
)
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="START END",
    default=(0.0, 1.0),
    help="Guide between these shares of the steps only; the others cost half.  [default: 0 1, all]",
)
@click.option(
    "--cache-interval",
    type=int,
    metavar="N",
    default=1,
    show_default=True,
    help="Run the whole U-Net every N steps and its outermost layer between: faster, not exact.",
)
@click.option(
    "--vae-tile",
    type=int,
    metavar="PIXELS",
    help="Decode in tiles of this side: less memory, not exact.  [default: the picture at once]",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Picture number i uses seed + i.")
@click.option(
    "--count",
    type=click.IntRange(1, 100_000),
    metavar="N",
    default=1,
    show_default=True,
    help="Pictures for each prompt.",
)
@click.option("--height", type=int, metavar="N", help="Pixels.  [default: the model's own]")
@click.option("--width", type=int, metavar="N", help="Pixels.  [default: the model's own]")
@click.option("--scheduler", type=click.Choice(SAMPLERS), default="pndm", show_default=True)
@click.option(
    "--noise", type=click.Choice(NOISES), default="cpu", show_default=True, help="Which of torch's generators."
)
@click.option("--init-image", type=click.Path(path_type=Path), metavar="PICTURE", help="Start from this picture.")
@click.option(
    "--strength", type=float, metavar="X", default=0.8, show_default=True, help="How much of --init-image is redone."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", help="Pictures at once.  [default: what fits 2 GiB]"
)
@click.option("--backend", type=click.Choice(("auto", *BACKENDS)), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="[default: one for each physical core]")
@click.option(
    "--arithmetic",
    type=click.Choice(ARITHMETICS),
    default="auto",
    show_default=True,
    help="auto is bf16 where OpenVINO runs and bf16 is the fastest on the processor.",
)
@click.option("--pinning", is_flag=True, help="Tie OpenVINO's threads to cores.")
@click.option(
    "--compiled-cache",
    is_flag=True,
    help="Keep what OpenVINO or TensorRT-RTX compiles for the next run, in the user's cache.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version)
@click.option(
    "-h",
    "--help",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_help,
    help="Show this message and exit.",
)
@click.pass_context
def command(
    context: click.Context,
    words: tuple[str, ...],
    prompts_file: str | None,
    from_png: Path | None,
    bundle: Path | None,
    output: str | None,
    negative_prompt: str,
    steps: int,
    guidance_scale: float | None,
    guidance_interval: tuple[float, float],
    cache_interval: int,
    vae_tile: int | None,
    seed: int,
    count: int,
    height: int | None,
    width: int | None,
    scheduler: str,
    noise: str,
    init_image: Path | None,
    strength: float,
    batch_size: int | None,
    backend: str,
    threads: int | None,
    arithmetic: str,
    pinning: bool,
    compiled_cache: bool,
    verbose: bool,
) -> int:
    """Make a picture from PROMPT, without torch. The path of each picture is printed when it is done.

    \b
    bksdm-run "a red apple"
    bksdm-run "a red apple" --bundle out/bk-sdm-small -o apple.png
    bksdm-run --prompts-file prompts.txt --count 4 -o "out/{index:03}-{prompt}.png"
    bksdm-run --from-png apple.png
    """
    # Here and not above: --help must work whatever is installed.
    from bksdm_runtime.pictures import MISUSE, USER_ERRORS, Order, make, order_from_png

    if len(words) > 1:
        raise click.UsageError(f'quote a prompt of several words: "{" ".join(words)}"', context)
    prompt = words[0] if words else None
    if (prompt is not None) + (prompts_file is not None) + (from_png is not None) != 1:
        raise click.UsageError("give one of PROMPT, --prompts-file and --from-png", context)
    _log_to_stderr(verbose, context)
    settings = EngineSettings(backend, threads, arithmetic, pinning, user_folder() if compiled_cache else None)
    try:
        if from_png is not None:
            _refuse_flags_beside_from_png(context)
            order = order_from_png(from_png, bundle, output, settings)
        else:
            prompts = [prompt] if prompt is not None else _read_prompts(prompts_file or "", context)
            seeds = range(seed, seed + len(prompts) * count)
            if not SEED_MIN <= seed <= seeds[-1] <= SEED_MAX:
                raise click.UsageError(f"seeds go from {SEED_MIN} to {SEED_MAX}", context)
            requests = tuple(
                Request(
                    prompt=prompts[i // count],
                    negative_prompt=negative_prompt,
                    seed=one,
                    steps=steps,
                    guidance_scale=guidance_scale,
                    height=height,
                    width=width,
                    sampler=scheduler,
                    init_image=init_image,
                    strength=strength,
                    noise=noise,
                    guidance_interval=guidance_interval,
                    cache_interval=cache_interval,
                    vae_tile=vae_tile,
                )
                for i, one in enumerate(seeds)
            )
            order = Order(requests, bundle, output, settings, batch_size)
        with closing(make(order)) as paths:
            for path in paths:
                _print(str(path))
    except USER_ERRORS as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 2 if isinstance(error, (MissingBackend, *MISUSE)) else 1
    except MemoryError:
        click.echo(f"{_PROGRAM}: out of memory: use a smaller size or --batch-size 1", err=True)
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """The command as a function, from arguments (None: the process's own) to its exit code."""
    try:
        return run_command(command, _PROGRAM, arguments)
    except _StdoutError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, BrokenPipeError):  # a reader that is gone had enough
            click.echo(f"{_PROGRAM}: stdout cannot be written: {cause.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's last flush must not complain again
        return 1


def main() -> None:
    sys.exit(run())


def _read_prompts(source: str, context: click.Context) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise click.UsageError(f"--prompts-file {source} cannot be read: {error.strerror}", context) from None
    except UnicodeDecodeError:
        raise click.UsageError(f"--prompts-file {source} is not UTF-8 text", context) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise click.UsageError(f"--prompts-file {source} holds no prompt", context)
    return prompts


def _refuse_flags_beside_from_png(context: click.Context) -> None:
    for parameter in context.command.params:
        given = (
            parameter.name and context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
        )
        if given and parameter.name not in _FROM_PNG_TAKES:
            raise click.UsageError(f"--from-png takes that from the picture: leave out {parameter.opts[0]}", context)


def _log_to_stderr(verbose: bool, context: click.Context) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{_PROGRAM}: %(message)s"))
    logger = logging.getLogger("bksdm_runtime")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO if verbose else logging.WARNING)

    def undo() -> None:  # what calls the command in its own process keeps its logging
        logger.removeHandler(handler)
        logger.setLevel(before)

    context.call_on_close(undo)
