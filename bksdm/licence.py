"""The licence that travels with weights: its name, and the text that must be handed on with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bksdm.errors import CheckpointError

OPENRAIL_M = "CreativeML OpenRAIL-M"
OPENRAIL_PLUS_PLUS_M = "CreativeML OpenRAIL++-M"
UNKNOWN = "unknown"

_PUBLISHED = {
    OPENRAIL_M: "creativeml-openrail-m.txt",
    OPENRAIL_PLUS_PLUS_M: "creativeml-openrail-plus-plus-m.txt",
}
# Looked for in this order, so that one file is chosen on every machine.
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")


@dataclass(frozen=True)
class Licence:
    """name: short, as a person would say it. notice: the full text that travels with the weights."""

    name: str
    notice: str


RANDOM = Licence("none (random weights)", "Random weights: nothing was trained, and no licence applies to them.\n")


def published(name: str) -> Licence:
    """The licence of weights on the Hub, with its whole text (paragraph 4 asks that every recipient gets a copy)."""
    text = (resources.files("bksdm") / "licences" / _PUBLISHED[name]).read_text(encoding="utf-8")
    return Licence(name, text)


def of_folder(folder: Path, *, name: str | None = None) -> Licence | None:
    """The licence file that lies in a checkpoint folder, or None.

    name: what the folder's own record calls it; without one the text itself decides, so that renamed
    copies of the OpenRAIL texts are still called by their name.
    """
    for file in LICENCE_FILES:
        path = folder / file
        if path.is_file():
            try:
                notice = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as reason:
                raise CheckpointError(f"{path} cannot be read as text ({reason})") from reason
            return Licence(name or _name_in(notice), notice)
    return None


def of_header(entries: Mapping[str, str], source: str) -> Licence:
    """What a single file says of itself in its header (the modelspec entries); unknown when it says nothing."""
    if name := entries.get("modelspec.license"):
        author = entries.get("modelspec.author", "its author")
        return Licence(name, f"{source} by {author} names its licence in its header: {name}\n")
    return unknown(source)


def unknown(source: str) -> Licence:
    """For weights that came with no licence file: say so, rather than guess."""
    return Licence(
        UNKNOWN, f"No licence file came with these weights ({source}). Ask their author before passing on.\n"
    )


def joined(first: Licence, second: Licence) -> Licence:
    """Of weights that both apply to: every name once, and both notices, the one that holds the other alone."""
    names = " and ".join(dict.fromkeys([*first.name.split(" and "), *second.name.split(" and ")]))
    ours, theirs = first.notice.strip(), second.notice.strip()
    if theirs in ours:
        return Licence(names, first.notice)
    if ours in theirs:
        return Licence(names, second.notice)
    return Licence(names, f"{ours}\n\n{'-' * 80}\n\n{theirs}\n")


def _name_in(notice: str) -> str:
    head = notice[:2000]
    if "RAIL++-M" in head:
        return OPENRAIL_PLUS_PLUS_M
    if "CreativeML Open RAIL-M" in head or "OpenRAIL-M" in head:
        return OPENRAIL_M
    first = next((line.strip() for line in notice.splitlines() if line.strip()), UNKNOWN)
    return first[:80]
