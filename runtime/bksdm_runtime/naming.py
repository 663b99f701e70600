"""Names for pictures on disk: what -o means, and that no picture lands on another."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bksdm_runtime.request import Request

DEFAULT_TEMPLATE = "{prompt}-{seed}"
_PLACES = ("index", "n", "prompt", "seed")
_PLACE = re.compile(r"\{([^{}:]*)(?::0?(\d{1,2}))?\}")
_SLUG_BYTES = 120  # file systems allow 255 bytes in a name; this leaves room for the seed and a template's own text


class NamingError(ValueError):
    """An -o that names no picture; the message is one sentence with the valid choices."""


@dataclass(frozen=True)
class Target:
    """Where a picture goes. exact: the user named this very file, so it may be replaced."""

    path: Path
    exact: bool

    def free_path(self) -> Path:
        """The path itself when exact, otherwise the first of name.png, name-1.png, ... that does not exist."""
        return self.path if self.exact else _first_free(self.path, frozenset())


def targets(output: str | None, requests: Sequence[Request]) -> list[Target]:
    """One target for each request, all different. Raises NamingError.

    output: None (named after prompt and seed, here), a folder, a template with {index} {n} {prompt} {seed} (numbers
    may be padded, {index:03}), or a name, which several pictures share as name-0.png, name-1.png, ...
    """
    template, exact = _template(output, len(requests))
    chosen: list[Target] = []
    taken: set[Path] = set()
    for index, request in enumerate(requests):
        values: dict[str, str | int] = {
            "index": index,
            "n": len(requests),
            "prompt": slug(request.prompt),
            "seed": request.seed,
        }
        path = Path(_fill(template, values))
        path = path if exact else _first_free(path, taken)
        taken.add(path)
        chosen.append(Target(path, exact))
    return chosen


def slug(prompt: str) -> str:
    """The prompt as part of a file name: letters and digits of any script, lower case, the rest as hyphens."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).casefold())
    text = "-".join(words).encode("utf-8")[:_SLUG_BYTES].decode("utf-8", errors="ignore")
    return text.strip("-") or "untitled"


def _template(output: str | None, count: int) -> tuple[str, bool]:
    if output is None:
        return f"{DEFAULT_TEMPLATE}.png", False
    if output == "" or "\0" in output:
        raise NamingError("-o must name a picture or a folder")
    if output.endswith(("/", "\\")) or Path(output).is_dir():
        return str(Path(output) / f"{DEFAULT_TEMPLATE}.png"), False
    if "{" in output or "}" in output:
        for place in _PLACE.findall(output):
            if place[0] not in _PLACES:
                raise NamingError(f"-o has {{{place[0]}}}, known are {', '.join(f'{{{name}}}' for name in _PLACES)}")
        if set(_PLACE.sub("", output)) & set("{}"):
            raise NamingError(f"-o has a brace without its partner: {output}")
        return _png(output), False
    if count == 1:
        return _png(output), True
    return f"{_png(output)[: -len('.png')]}-{{index}}.png", False


def _png(output: str) -> str:
    suffix = Path(_PLACE.sub("x", output)).suffix
    if suffix.lower() == ".png":
        return output
    if suffix and suffix[1:].isalpha():
        raise NamingError(
            f"-o must end in .png, found {suffix}: pictures are written as PNG, which carries their request"
        )
    return output + ".png"


def _fill(template: str, values: dict[str, str | int]) -> str:
    def value(match: re.Match[str]) -> str:
        found = values[match[1]]
        return f"{found:0{match[2]}d}" if match[2] and isinstance(found, int) else str(found)

    return _PLACE.sub(value, template)


def _first_free(path: Path, taken: set[Path] | frozenset[Path]) -> Path:
    candidate, number = path, 0
    while candidate in taken or candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
