"""Names for pictures on disk: what -o means, and that no picture lands on another."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence, Set
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
        """The path itself when exact, otherwise the first of name.png, name-1.png, ... that does not exist.

        Raises NamingError when the file system cannot say.
        """
        return self.path if self.exact else _first_free(self.path, frozenset(), 0)[0]


def targets(output: str | None, requests: Sequence[Request]) -> list[Target]:
    """One target for each request, all different. Raises NamingError.

    output: None (named after prompt and seed, here), a folder, a template with {index} {n} {prompt} {seed} (numbers
    may be padded, {index:03}), or a name, which several pictures share as name-0.png, name-1.png, ...
    """
    template, exact = _template(output, len(requests))
    chosen: list[Target] = []
    taken: set[Path] = set()
    last: dict[Path, int] = {}  # where the search for a name ended: the next one of that name goes on from there
    for index, request in enumerate(requests):
        values: dict[str, str | int] = {
            "index": index,
            "n": len(requests),
            "prompt": slug(request.prompt),
            "seed": request.seed,
        }
        path = Path(_fill(template, values))
        if exact:
            _exists(path)  # a name that the file system does not take is known before the work
        else:
            wanted = path
            path, last[wanted] = _first_free(wanted, taken, last.get(wanted, 0))
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
    if output == "-":
        raise NamingError("-o - is not taken, for stdout carries the paths of the pictures: name a file or a folder")
    if output.endswith(("/", "\\")) or _is_folder(Path(output)):
        return str(Path(output) / f"{DEFAULT_TEMPLATE}.png"), False
    if "{" in output or "}" in output:
        for place in _PLACE.findall(output):
            if place[0] not in _PLACES:
                raise NamingError(f"-o has {{{place[0]}}}, known are {', '.join(f'{{{name}}}' for name in _PLACES)}")
            if place[0] == "prompt" and place[1]:
                raise NamingError("-o has a width for {prompt}: only the numbers {index} {n} {seed} take one")
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


def _first_free(path: Path, taken: Set[Path], number: int) -> tuple[Path, int]:
    """The first of name-number.png, name-(number + 1).png, ... that is free, and its number (0: name.png)."""
    while True:
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path
        if candidate not in taken and not _exists(candidate):
            return candidate, number
        number += 1


def _exists(path: Path) -> bool:
    """Whether anything is at the path. Raises NamingError on a path that the file system does not take."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # too long, or in a folder that may not be looked into
        shown = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]}..."
        raise NamingError(f"-o {ascii(shown)[1:-1]}: {error.strerror or error}") from None
    return True


def _is_folder(path: Path) -> bool:
    return _exists(path) and path.is_dir()
