"""-o means what a user expects, and no picture lands on another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bksdm_runtime.naming import NamingError, slug, targets
from bksdm_runtime.request import Request


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(output: str | None, *requests: Request) -> list[str]:
    return [str(target.path) for target in targets(output, requests)]


APPLE, PEAR = Request("A red apple!", seed=3), Request("a pear", seed=4)


@pytest.mark.parametrize(
    ("output", "one", "two"),
    [
        (None, ["a-red-apple-3.png"], ["a-red-apple-3.png", "a-pear-4.png"]),
        ("x.png", ["x.png"], ["x-0.png", "x-1.png"]),
        ("x", ["x.png"], ["x-0.png", "x-1.png"]),
        ("x.PNG", ["x.PNG"], ["x-0.png", "x-1.png"]),
        ("v1.5", ["v1.5.png"], ["v1.5-0.png", "v1.5-1.png"]),
        ("out/", ["out/a-red-apple-3.png"], ["out/a-red-apple-3.png", "out/a-pear-4.png"]),
        ("{index}.png", ["0.png"], ["0.png", "1.png"]),
        ("{index:03}-of-{n}", ["000-of-1.png"], ["000-of-2.png", "001-of-2.png"]),
        ("o/{seed}/{prompt}.png", ["o/3/a-red-apple.png"], ["o/3/a-red-apple.png", "o/4/a-pear.png"]),
        ("same{n}.png", ["same1.png"], ["same2.png", "same2-1.png"]),
        ("{seed:04}.png", ["0003.png"], ["0003.png", "0004.png"]),
    ],
)
def test_names(output: str | None, one: list[str], two: list[str]) -> None:
    assert names(output, APPLE) == one
    assert names(output, APPLE, PEAR) == two


def test_a_folder_that_exists_is_a_folder() -> None:
    Path("out").mkdir()
    assert names("out", APPLE) == ["out/a-red-apple-3.png"]


def test_only_a_file_named_by_the_user_is_replaced() -> None:
    for name in ("x.png", "x-0.png", "a-red-apple-3.png", "a-red-apple-3-1.png"):
        Path(name).touch()
    assert targets("x.png", [APPLE])[0].free_path() == Path("x.png")
    assert names("x.png", APPLE, PEAR) == ["x-0-1.png", "x-1.png"]
    assert names(None, APPLE) == ["a-red-apple-3-2.png"]


def test_a_file_that_appears_meanwhile_is_kept() -> None:
    [target] = targets(None, [APPLE])
    target.path.touch()
    assert target.free_path() == Path("a-red-apple-3-1.png")


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("x.jpg", r"must end in \.png, found \.jpg"),
        ("{index}.webp", r"must end in \.png, found \.webp"),
        ("{name}.png", r"has \{name\}, known are \{index\}, \{n\}, \{prompt\}, \{seed\}"),
        ("{index.__class__}.png", "known are"),
        ("{}.png", r"has \{\}, known are"),
        ("{index", "without its partner"),
        ("", "must name a picture or a folder"),
        ("a\0b", "must name a picture or a folder"),
        ("-", "-o - is not taken, for stdout carries the paths"),
        ("{prompt:20}.png", r"a width for \{prompt\}: only the numbers"),
        ("x" * 300, r"^-o x{100}\.\.\.: File name too long$"),
        ("x" * 300 + "{index}", r"^-o x{100}\.\.\.: File name too long$"),
        ("x" * 300 + "/", r"^-o x{100}\.\.\.: File name too long$"),
    ],
)
def test_a_wrong_output_is_one_sentence(output: str, match: str) -> None:
    with pytest.raises(NamingError, match=match):
        targets(output, [APPLE])


@pytest.mark.parametrize("there", [0, 500])
def test_a_thousand_pictures_of_one_prompt_do_not_ask_for_a_name_half_a_million_times(
    there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        asked.append(path)
        return real(path)

    for number in range(there):
        Path(f"a-red-apple-{number}.png" if number else "a-red-apple.png").touch()
    monkeypatch.setattr(Path, "lstat", lstat)
    found = names("{prompt}.png", *[APPLE] * 1000)
    assert len(set(found)) == 1000
    assert found[-1] == f"a-red-apple-{999 + there}.png"
    assert len(asked) <= 1010 + there


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red, RED apple!", "a-red-red-apple"),
        ("", "untitled"),
        ("🍎", "untitled"),
        ("../../etc/passwd", "etc-passwd"),
        ("a/b\\c:d\n", "a-b-c-d"),
        ("{seed}", "seed"),
        ("红苹果 on a table", "红苹果-on-a-table"),
        ("Crème brûlée_x", "crème-brûlée-x"),
    ],
)
def test_slugs(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


@pytest.mark.parametrize("prompt", ["apple " * 1000, "苹果" * 1000, "a" * 119 + "é"])
def test_a_long_slug_is_a_name_that_the_file_system_takes(prompt: str) -> None:
    text = slug(prompt)
    assert len(os.fsencode(text)) <= 120
    assert text == text.strip("-")
