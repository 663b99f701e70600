"""What an export raises."""

from __future__ import annotations


class ExportError(Exception):
    """The export cannot be done, or its result is wrong; the message is for the user."""
