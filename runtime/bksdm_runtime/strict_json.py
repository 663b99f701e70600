"""JSON from a file that may be hostile: every surprise is one `JsonError` that says where it stands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import NoReturn, cast


class JsonError(ValueError):
    """The text is not JSON, or not the JSON that was expected; the message is one sentence."""


def parse_object(text: str, *, minus_infinity: bool = False) -> dict[str, object]:
    """Parse one JSON object, strictly: no NaN or infinity, no key twice, no nesting that exhausts the stack.

    minus_infinity: read `-Infinity`, which Python's json writes and which is not JSON. Raises JsonError; never
    RecursionError.
    """

    def constant(name: str) -> float:
        if minus_infinity and name == "-Infinity":
            return -math.inf
        raise JsonError(f"has {name}, which is not JSON")

    try:
        # The decoder is typed as returning Any; every field is checked by `Fields` before use.
        value = cast(
            object,
            json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite_float, parse_constant=constant),
        )
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and the interpreter's own limit on the digits of an integer
        raise JsonError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise JsonError(f"must hold a JSON object, found {_describe(value)}")
    return cast("dict[str, object]", value)


class Fields:
    """Typed access to one JSON object; `where` is its place in the document and opens every error."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise JsonError(f"{where} must be an object, found {_describe(value)}")
        self._values = cast("dict[str, object]", value)
        self.where = where

    def only(self, *names: str) -> None:
        """Refuse any key that the schema does not know: a newer writer raises the schema version instead."""
        for name in self._values:
            if name not in names:
                raise JsonError(f"{self._at(name)} is unknown (known: {', '.join(names)})")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str) -> str:
        return self._text(self._get(name), self._at(name))

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self._get(name)
        if not isinstance(value, str) or value not in choices:
            self._refuse(name, " or ".join(choices), value)
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(name, f"a whole number from {low} to {high}", value)
        return value

    def number(self, name: str) -> float:
        """A finite number (infinity and NaN never pass the parser)."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(name, "a number", value)
        try:
            return float(value)
        except OverflowError:
            self._refuse(name, "a number that fits 64-bit floating point", value)

    def fields(self, name: str) -> Fields:
        return Fields(self._get(name), self._at(name))

    def mapping(self, name: str) -> Mapping[str, object]:
        """The object under `name` as it is, for content that the reader passes on without looking at it."""
        return self.fields(name)._values

    def texts(self, name: str) -> dict[str, str]:
        """The object under `name`, whose values are all text."""
        found = self.fields(name)
        return {key: found.text(key) for key in found._values}

    def items(self) -> Iterator[tuple[str, Fields]]:
        """Every value as an object, with its key (which is text that may be printed)."""
        for name, value in self._values.items():
            yield self._text(name, f"a key of {self.where or 'the document'}"), Fields(value, self._at(name))

    def array(self, name: str, longest: int) -> list[tuple[object, str]]:
        """The elements of the array under `name`, each with its place."""
        value = self._get(name)
        elements = cast("list[object]", value) if isinstance(value, list) else None
        if elements is None or len(elements) > longest:
            self._refuse(name, f"an array of at most {longest} elements", self._values[name])
        return [(element, f"{self._at(name)}[{i}]") for i, element in enumerate(elements)]

    def _get(self, name: str) -> object:
        if name not in self._values:
            raise JsonError(f"{self._at(name)} is missing")
        return self._values[name]

    def _at(self, name: str) -> str:
        shown = _shorten(name)
        return f"{self.where}.{shown}" if self.where else shown

    def _refuse(self, name: str, expected: str, found: object) -> NoReturn:
        raise JsonError(f"{self._at(name)} must be {expected}, found {_describe(found)}")

    @staticmethod
    def _text(value: object, where: str) -> str:
        # Control characters and lone surrogates cannot be printed or be part of a path.
        if not isinstance(value, str) or not all(c == " " or c == "\n" or c.isprintable() for c in value):
            raise JsonError(f"{where} must be printable text, found {_describe(value)}")
        return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise JsonError(f"has the key {_shorten(name)} twice")
        found[name] = value
    return found


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"has a number out of range: {_shorten(digits)}")
    return value


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**40:
        return "a huge number"  # the interpreter refuses to print integers past 4,300 digits
    return _shorten(json.dumps(value))


def _shorten(text: str, longest: int = 60) -> str:
    shown = text if text.isascii() and text.isprintable() else ascii(text)
    return shown if len(shown) <= longest else shown[:longest] + "..."
