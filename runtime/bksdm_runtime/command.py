"""A command as a function: from its arguments to its exit code, and one sentence for a user's mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import click

from bksdm_runtime.version import version

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


Decorated = TypeVar("Decorated", bound=Callable[..., object])


def version_option(program: str) -> Callable[[Decorated], Decorated]:
    """--version, which prints the program's name and version and ends."""

    def tell(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
        if wanted and not context.resilient_parsing:
            click.echo(f"{program} {version()}")
            context.exit()

    return click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=tell)


def run(command: click.Command, program: str, arguments: Sequence[str] | None) -> int:
    """arguments: None for the process's own. The command's own exit code is what it returns, 0 for nothing."""
    try:
        code: object = command.main(args=arguments, prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo(f"{program}: interrupted", err=True)
        return INTERRUPTED
