"""A command as a function: from its arguments to its exit code, and one sentence for a user's mistake."""

from __future__ import annotations

from collections.abc import Sequence

import click

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


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
