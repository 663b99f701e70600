"""What goes wrong in the family, said in one sentence."""

from __future__ import annotations

from typing import Literal


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message is one sentence that says what to do.

    change: which argument of bksdm.checkpoint.load would help, so that a command can name its own flag for it.
    """

    def __init__(self, message: str, *, change: Literal["weights", "variant"] | None = None) -> None:
        super().__init__(message)
        self.change = change


class IncompatibleTeacher(Exception):  # noqa: N818 - it is the teacher that does not fit, and it reads so
    """A teacher that the removal rule cannot be applied to; the message names the first key or setting that differs."""


class VariantError(ValueError):
    """A name that is no row of the table of variants; the message lists the rows."""


def first_line(reason: BaseException) -> str:
    """What an exception of a library says first, for a sentence of ours; its type where it says nothing."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]
