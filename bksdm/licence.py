"""The licence that travels with weights: its name, and the text that must be handed on with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bksdm.errors import CheckpointError

OPENRAIL_M = "CreativeML OpenRAIL-M"
OPENRAIL_PLUS_PLUS_M = "CreativeML OpenRAIL++-M"
UNKNOWN = "unknown"
UNNAMED = "see the notice"

_PUBLISHED = {
    OPENRAIL_M: "creativeml-openrail-m.txt",
    OPENRAIL_PLUS_PLUS_M: "creativeml-openrail-plus-plus-m.txt",
}
# How model cards and headers write the two, without case, spaces and hyphens; the last is the Hub's own identifier.
_SPELLINGS = {
    "creativemlopenrailm": OPENRAIL_M,
    "creativemlopenrail++m": OPENRAIL_PLUS_PLUS_M,
    "openrail++": OPENRAIL_PLUS_PLUS_M,
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
    """The licence file that lies in a checkpoint folder, or what its model card (README.md) names, or None.

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
    return _of_model_card(folder / "README.md")


def of_header(entries: Mapping[str, str], source: str) -> Licence:
    """What a single file says of itself in its header (the modelspec entries); unknown when it says nothing."""
    if name := entries.get("modelspec.license"):
        author = entries.get("modelspec.author", "its author")
        return _stated(name, f"{source} by {author} names its licence in its header: {name}")
    return unknown(source)


def of_variant(name: str, variant: str, source: str) -> Licence:
    """For weights without a licence of their own that are said to be a published model."""
    return _stated(name, f"No licence file came with these weights ({source}); they are said to be {variant}: {name}")


def with_part(terms: Licence, own: Licence, part: str) -> Licence:
    """The licence of a model, one part of which ("U-Net") has a licence of its own."""
    if own.notice == terms.notice:
        return terms
    name = terms.name if own.name == terms.name else f"{terms.name}; {part}: {own.name}"
    return Licence(name, f"{terms.notice}\n\nThe {part}:\n\n{own.notice}")


def unknown(source: str) -> Licence:
    """For weights that came with no licence file: say so, rather than guess."""
    return Licence(
        UNKNOWN, f"No licence file came with these weights ({source}). Ask their author before passing on.\n"
    )


def _stated(name: str, sentence: str) -> Licence:
    """A licence known by its name alone: with its whole text where this package has it."""
    known = _SPELLINGS.get(re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("license"))
    return Licence(known, f"{sentence}\n\n{published(known).notice}") if known else Licence(name, f"{sentence}\n")


def _of_model_card(path: Path) -> Licence | None:
    if not path.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    for key in ("license_name", "license"):  # the Hub's "license: other" has its name beside it
        if front and (found := re.search(rf"^{key}: *['\"]?([^'\"\n#]+)", front[1], re.MULTILINE)):
            return _stated(found[1].strip(), f"The model card of these weights names their licence: {found[1].strip()}")
    return None


def joined(first: Licence, second: Licence) -> Licence:
    """Of weights that both apply to: every name once, and both notices, the one that holds the other alone.

    A notice without a name of its own goes by that of one which holds it."""
    names = " and ".join(dict.fromkeys([*first.name.split(" and "), *second.name.split(" and ")]))
    ours, theirs = first.notice.strip(), second.notice.strip()
    if theirs in ours:
        return Licence(first.name if second.name == UNNAMED else names, first.notice)
    if ours in theirs:
        return Licence(second.name if first.name == UNNAMED else names, second.notice)
    return Licence(names, f"{ours}\n\n{'-' * 80}\n\n{theirs}\n")


def _name_in(notice: str) -> str:
    head = notice[:2000]
    if "RAIL++-M" in head:
        return OPENRAIL_PLUS_PLUS_M
    if "CreativeML Open RAIL-M" in head or "OpenRAIL-M" in head:
        return OPENRAIL_M
    first = next((line.strip() for line in notice.splitlines() if line.strip()), UNKNOWN)
    return first[:80]
