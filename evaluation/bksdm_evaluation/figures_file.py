"""The JSON file that a command leaves its figures in, and what repeats them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click


def write_figures(output: Path, figures: Mapping[str, object]) -> None:
    """The whole file or the one that was there."""
    staging = output.with_name(f".{output.name}")
    try:
        staging.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        staging.replace(output)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror or error}") from error


def versions(*packages: str) -> dict[str, str]:
    """Of what computed, those that are installed."""
    found: dict[str, str] = {}
    for package in ("bksdm", "numpy", "pillow", *packages):
        with suppress(PackageNotFoundError):  # one of the two onnxruntimes
            found[package] = version(package)
    return found


def refuse_unwritable(output: Path, option: str = "--output") -> None:
    """Notice before minutes of work that the result could not be written."""
    if output.is_dir():
        raise click.BadParameter(f"{output} is a folder, not a file", param_hint=option)
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output.parent} is not a folder", param_hint=option)
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{output.parent} cannot be written", param_hint=option)
