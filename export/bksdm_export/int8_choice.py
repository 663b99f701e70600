"""Which layers an earlier int8 bundle keeps in fp32, for an export that takes its word (`--int8-like`).

What int8 costs each layer takes most of an export's time to measure. Layers are told by their names alone; whether
another model's choice serves this one is not assumed: the new bundle is judged by its own pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm_export.errors import ExportError
from bksdm_export.precision import Sensitive
from bksdm_export.report import PARITY_JSON


@dataclass(frozen=True)
class Choice:
    """Of one graph. layers: those that stay fp32; source: the bundle in which that was measured."""

    layers: tuple[Sensitive, ...]
    source: str


def read(path: Path) -> Mapping[str, Choice]:
    """By component in int8, of a bundle's folder or of its parity.json alone. Raises ExportError."""
    file = path / PARITY_JSON if path.is_dir() else path
    try:
        content = file.read_bytes()
        components: Any = json.loads(content)["components"]
        if any("precision" not in graph for graph in components.values()):
            raise ExportError(f"{file} is of an older bksdm-export, which did not say enough: export that bundle again")
        own = f"{file.resolve().parent.name} (parity.json {hashlib.sha256(content).hexdigest()[:12]})"
        found = {
            name: Choice(
                tuple(Sensitive(str(one["layer"]), float(one["error"])) for one in graph["sensitive"]),
                graph["sensitive_of"] or own,
            )
            for name, graph in components.items()
            if graph["precision"] == "int8"
        }
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} is no report of an export: {type(error).__name__} {error}") from None
    if not found:
        raise ExportError(f"{file} is of an export without int8: it chose no layers")
    return found
