"""`bksdm-client`: a prompt becomes a picture on a server. Paths on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click

from bksdm_runtime.command import run as run_command
from bksdm_runtime.command import version_option
from bksdm_runtime.schedule import SAMPLERS

_PROGRAM = "bksdm-client"
_MAX_SEED = 2**64 - 1


@click.command(context_settings={"max_content_width": 110})
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Picture to write (replaced if it exists), a folder, or a template with {prompt} {seed} {index} {n}.  "
    "[default: {prompt}-{seed}.png]",
)
@click.option(
    "--url",
    metavar="HOST:PORT",
    default="127.0.0.1:8001",
    show_default=True,
    help="The server's gRPC; grpcs://HOST:PORT for TLS.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What the picture should not show.")
@click.option("--steps", type=int, metavar="N", help="[default: the server's]")
@click.option("--guidance-scale", type=float, metavar="X", help="1 is none, at half the work.  [default: the server's]")
@click.option(
    "--seed",
    type=click.IntRange(0, _MAX_SEED),
    metavar="N",
    default=0,
    show_default=True,
    help="Picture number i uses seed + i.",
)
@click.option("--height", type=int, metavar="N", help="Pixels.  [default: the server's]")
@click.option("--width", type=int, metavar="N", help="Pixels.  [default: the server's]")
@click.option("--sampler", "--scheduler", "sampler", type=click.Choice(SAMPLERS), help="[default: pndm]")
@click.option(
    "--count", type=click.IntRange(1, 100_000), metavar="N", default=1, show_default=True, help="Pictures to draw."
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    metavar="N",
    default=1,
    show_default=True,
    help="Pictures to have under way at once.",
)
@click.option("--stream", is_flag=True, help="Show each step.")
@click.option(
    "--preview",
    "previews",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a small picture of each step there; shows each step, too.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For a picture, its wait in the server's queue included.  [default: none]",
)
@version_option(_PROGRAM)
@click.pass_context
def command(
    context: click.Context,
    prompt: str,
    output: str | None,
    url: str,
    negative_prompt: str | None,
    steps: int | None,
    guidance_scale: float | None,
    seed: int,
    height: int | None,
    width: int | None,
    sampler: str | None,
    count: int,
    concurrency: int,
    stream: bool,
    previews: Path | None,
    timeout: float | None,
) -> int:
    """Have a server draw PROMPT: Triton, with a repository of bksdm-triton.

    \b
    bksdm-client "a red apple" -o apple.png
    bksdm-client "a red apple" --count 16 --concurrency 8 -o out/
    bksdm-client "a red apple" --preview steps/ --url gpu-server:8001
    """
    # Here and not above: --help must work whatever is installed.
    try:
        from bksdm_runtime.client import Client
        from bksdm_runtime.client_pictures import MISUSE, USER_ERRORS, Order, fetch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("grpc", "tritonclient"):
            raise
        click.echo(f"{_PROGRAM}: needs {error.name}: pip install 'bksdm[triton]'", err=True)
        return 2
    if seed + count - 1 > _MAX_SEED:
        raise click.UsageError(f"seeds go up to {_MAX_SEED}", context)
    fields = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "sampler": sampler,
    }
    order = Order(prompt, fields, seed, count, output, stream, previews, concurrency)
    try:
        client = Client(url, timeout=timeout)
    except ValueError as error:
        raise click.UsageError(f"--url {error}", context) from None
    try:
        with closing(fetch(order, client)) as paths:
            for path in paths:
                click.echo(str(path))
    except USER_ERRORS as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 2 if isinstance(error, MISUSE) else 1
    finally:
        client.close()
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """The command as a function, from arguments (None: the process's own) to its exit code."""
    return run_command(command, _PROGRAM, arguments)


def main() -> None:
    sys.exit(run())
