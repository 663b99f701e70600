# ruff: noqa: RUF001 - look-alike characters are what is tested
"""The runtime's tokenizer against transformers' own, on some 6,000 strings of every kind."""

import json
import random
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, CLIPTokenizerFast

from bksdm_runtime.tokenizer import Tokenizer, TokenizerError

CLIP_FOLDER = Path(__file__).parents[2] / "bksdm" / "clip_tokenizer"
VOCABULARY = ("vocab.json", "merges.txt")
needs_reference = pytest.mark.needs_reference  # see conftest.py

PROMPTS = [
    "a photo of an astronaut riding a horse on mars",
    "A Red Apple, studio lighting; 3D render (trending on ArtStation) -- 4K/8K HDR!!!",
    "the cat's whiskers don't we've I'm they'll he'd THE CAT'S",
    "“curly” ‘quotes’ and it’s — an em-dash… «guillemets» „low“",
    "masterpiece, best quality, (soft light:1.2), [[noise]], {{detail}}, <lora:style:0.8>",
    "http://example.org/a?b=c&d=e #hashtag @mention user_name snake_case kebab-case",
    "&amp; &lt;b&gt; &quot;html&quot; &#39; &copy;2024 &nbsp; &eacute;",
    "1234567890 3.14159 1,000,000 ½ ² Ⅷ ① 10% $5 €7 50°",
    "café naïve Ångström résumé ñandú Straße ŒUVRE İstanbul ΟΔΟΣ Σίσυφος ﬁancé ﬀ",
    "cafe\u0301 A\u030angstro\u0308m Z\u0351\u036b\u0343\u036aa\u034f\u0329l\u031ego \u0345\u1fb3",
    "一只可爱的猫在草地上 美しい日本の風景、富士山 아름다운 한국의 풍경 東京タワー abc漢字def",
    "ﬀ Ａｂｃ　全角 ｶﾀｶﾅ ㍿ ℃ ™ ® ©",
    "قطة جميلة على العشب, שלום עולם, สวัสดีชาวโลก, नमस्ते दुनिया क्षत्रिय, Привет, мир, γειά σου, ქართული, አማርኛ",
    "👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇯🇵 👍🏽 ❤️ ☺ 1️⃣ #️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🦊🍎 :-) ¯\\_(ツ)_/¯",
    "tab\there\nnew\r\nlines\x0bvertical\x0cform\x85next\u2028line\u2029paragraph\x00null\x1b[31mred\x7f",
    "no\u00a0break thin\u2009space ideographic\u3000space zero\u200bwidth",
    "soft\u00adhyphen \ufeffbom word\u2060joiner \u202ertl",
    "<|startoftext|>typed<|endoftext|> marks<|endoftext|><|STARTOFTEXT|> and<|EndOfText|>",
    "\ufffd \ufffc \ue000 \uffff \U0010ffff \u0378",
    "'s 't 're 've 'm 'll 'd 'S 'ſ ''s 's's",
    "",
    " ",
    "\n\t \r",
    "!",
    "!!! hello! !",
    "a",
]
CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)])) + "\u200b\u200c\u200d\u200e\u2060\ufeff\u00ad\ufffd\u061c"
SPACES = " \t\n\r\u00a0\u1680\u2000\u2003\u2009\u202f\u205f\u3000\u2028\u2029"


def _characters(*ranges: tuple[int, int]) -> list[str]:
    characters = [chr(point) for first, last in ranges for point in range(first, last + 1)]
    return [character for character in characters if unicodedata.category(character)[0] != "C"]


EMOJI = _characters((0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1FAFF), (0x2600, 0x27BF), (0x1F1E6, 0x1F1FF))
ALPHABETS: dict[str, list[str]] = {
    "ascii": _characters((32, 126)),
    "words": [
        "a",
        "the photo",
        "of CAT",
        "red Apple's",
        "don't",
        "4k,",
        ".",
        "!",
        "--",
        "(masterpiece)",
        "ultra-realistic",
    ],
    "emoji": [*EMOJI, "\u200d", "\ufe0f", "\U0001f3fd", " "],
    "latin": _characters((0x20, 0x24F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xFB00, 0xFB06)),
    "accents": [*"aeiou AEIOUncs", *_characters((0x300, 0x36F))],
    "greek and cyrillic": [*_characters((0x370, 0x52F), (0x1F00, 0x1FFF)), " ", "."],
    "arabic and hebrew": [*_characters((0x590, 0x77F), (0xFB1D, 0xFDFF)), " "],
    "indic and thai": [*_characters((0x900, 0xE7F)), " "],
    "cjk": [*_characters((0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF)), "a", " "],
    "quotes": [*"'\"`‘’“”‚„‹›«»′″ stmdſSTMD<|>"],
    "control": [*CONTROLS, *SPACES, *"abc!1"],
    "html": ["&amp;", "&lt;", "&#39;", "&quot;", "&eacute;", "<b>", "</b>", "text", " ", "&", ";"],
    "everything": _characters((0, 0x2FFF), (0xA000, 0xABFF), (0x10000, 0x1FFFF), (0x20000, 0x2FA1F)),
}


def strings() -> list[str]:
    """Some 6,000 strings, the same in every run."""
    rng = random.Random(0)
    made = list(PROMPTS)
    made += [a + " " + b for a in PROMPTS[:20] for b in PROMPTS[:20]]
    made += [prompt * 20 for prompt in PROMPTS] + ["x" * 1000, "word " * 5000, "🦊" * 200, "漢" * 500]
    made += EMOJI + ["a " + emoji + "\ufe0f on a table" for emoji in EMOJI[::4]]
    for alphabet, pieces in ALPHABETS.items():
        glue = " " if alphabet == "words" else ""
        made += [glue.join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(250)]
    return made


STRINGS = strings()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.open(CLIP_FOLDER)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return CLIPTokenizer.from_pretrained(CLIP_FOLDER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer folder that a test may change: vocabulary only."""
    for name in VOCABULARY:
        shutil.copy(CLIP_FOLDER / name, tmp_path / name)
    return tmp_path


def their_ids(tokenizer: Any, text: str) -> list[int]:
    """As StableDiffusionPipeline.encode_prompt calls it."""
    return tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids


def differing(ours: Tokenizer, theirs: Any, texts: list[str]) -> list[str]:
    return [text for text in texts if ours.encode(text).ids.tolist() != their_ids(theirs, text)]


@needs_reference
def test_ids_equal_clip_tokenizer_on_thousands_of_strings(ours: Tokenizer, theirs: Any) -> None:
    assert len(set(STRINGS)) > 5000
    assert differing(ours, theirs, STRINGS) == []


@needs_reference
@settings(deadline=None)  # busy cores are no failure
@given(text=st.text())
def test_ids_equal_clip_tokenizer_on_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text).ids.tolist() == their_ids(theirs, text)


def in_a_class_of_difference(text: str) -> bool:
    """Whether the module's docstring says that CLIPTokenizerFast and transformers 5 may encode this otherwise."""
    controls = any((unicodedata.category(c)[0] == "C" and c not in "\t\n\r") or c == "\ufffd" for c in text)
    ideographs = any("CJK" in unicodedata.name(c, "") and "IDEOGRAPH" in unicodedata.name(c, "") for c in text)
    capital_mark = any(not mark.islower() for mark in re.findall(r"(?i)<\|(?:start|end)oftext\|>", text))
    return (
        controls
        or ideographs
        or capital_mark
        or "Σ" in text
        or "ſ" in text
        or "\u0345" in unicodedata.normalize("NFD", text)
    )


def test_ids_equal_the_fast_tokenizer_outside_the_classes_of_difference(ours: Tokenizer) -> None:
    fast = CLIPTokenizerFast.from_pretrained(CLIP_FOLDER)
    comparable = [text for text in STRINGS if not in_a_class_of_difference(text)]
    assert len(set(comparable)) > 3500
    assert differing(ours, fast, comparable) == []


def test_ids_are_77_int32_from_start_to_padding(ours: Tokenizer) -> None:
    ids = ours.encode("a red apple").ids
    assert ids.shape == (77,)
    assert ids.dtype == np.int32
    assert ids[:6].tolist() == [49406, 320, 736, 3055, 49407, 49407]
    assert set(ids[4:].tolist()) == {49407}


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udcff" * 100, "🦊"[:1] + "\ud83e"])
def test_lone_surrogates_are_dropped(ours: Tokenizer, text: str) -> None:
    kept = "".join(character for character in text if not "\ud800" <= character <= "\udfff")
    assert ours.encode(text).ids.tolist() == ours.encode(kept).ids.tolist()


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("", ""),
        ("word " * 75, ""),
        ("word " * 75 + "\n\u200b ", ""),  # nothing but space was left over
        ("word " * 75 + "  More\tText ", "More\tText "),
        ("Word\u3000" * 76 + "ÉND", "Word\u3000ÉND"),
        ("x " * 74 + "Antidisestablishmentarianism", "disestablishmentarianism"),  # cut inside a word
        ("x " * 74 + "🧑‍🚀 rides", "🧑‍🚀 rides"),  # cut inside an emoji: its first bytes are kept, but it is not
        ("漢" * 80, "漢" * 55),
        ("e\u0301 " * 80, "e\u0301 " * 5),
        ("\u200b" * 1000 + "a " * 76 + "b", "a b"),
        ("a " * 74 + "<|endoftext|>b c", "b c"),
    ],
)
def test_dropped_is_the_text_past_75_tokens_as_written(ours: Tokenizer, text: str, dropped: str) -> None:
    assert ours.encode(text).dropped == dropped


@needs_reference
@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text(max_size=8), min_size=15, max_size=60))
def test_dropped_is_there_exactly_when_transformers_truncates(ours: Tokenizer, theirs: Any, words: list[str]) -> None:
    text = " ".join(words)
    dropped = ours.encode(text).dropped
    assert text.endswith(dropped)
    assert bool(dropped) == (len(theirs.tokenize(text)) > 75)


def test_tokenizer_json_gives_the_same_ids(ours: Tokenizer, tmp_path: Path) -> None:
    CLIPTokenizerFast.from_pretrained(CLIP_FOLDER).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))  # pyright: ignore[reportAttributeAccessIssue]
    whole = Tokenizer.open(tmp_path)
    for text in STRINGS[::20]:
        assert whole.encode(text).ids.tolist() == ours.encode(text).ids.tolist()


@pytest.mark.parametrize("extra", [{}, {"added_tokens_decoder": {}}], ids=["older folder", "newer folder"])
@pytest.mark.parametrize("in_config", ["!", "<|endoftext|>"])
@pytest.mark.parametrize("in_map", ["!", "<|endoftext|>", None])
def test_the_padding_is_what_transformers_reads_from_the_folder(
    folder: Path, extra: dict[str, Any], in_config: str, in_map: str | None
) -> None:
    # SD 2 pads with "!"; Stability's folder says so in special_tokens_map.json against its tokenizer_config.json
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": in_config} | extra))
    if in_map:
        token = {"content": in_map, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
    tokenizer = Tokenizer.open(folder)
    theirs = CLIPTokenizer.from_pretrained(folder)
    for text in ("a red apple", "hello! wow!!! !", "", "word " * 100):
        assert tokenizer.encode(text).ids.tolist() == their_ids(theirs, text)


def test_a_folder_without_a_vocabulary_is_refused_naming_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json, and no vocab\.json"):
        Tokenizer.open(tmp_path / "absent")
    shutil.copy(CLIP_FOLDER / "vocab.json", tmp_path)
    with pytest.raises(TokenizerError, match=r"no merges\.txt either"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("name", [*VOCABULARY, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"[1, 2]", b"nonsense text without sense"])
def test_a_damaged_file_is_refused_in_one_sentence(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"(?s)^[^\n]*{name}[^\n]*$"):
        Tokenizer.open(folder)


def test_a_truncated_vocabulary_is_refused(folder: Path) -> None:
    path = folder / "vocab.json"
    path.write_bytes(path.read_bytes()[:500_000])
    with pytest.raises(TokenizerError, match=r"vocab\.json with merges\.txt cannot be read"):
        Tokenizer.open(folder)


def test_merges_cut_short_are_refused(folder: Path) -> None:
    path = folder / "merges.txt"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:40_000]), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"merges\.txt has 39999 merges, but a vocabulary of 49408"):
        Tokenizer.open(folder)


def test_a_vocabulary_without_the_special_tokens_is_refused(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    del vocabulary["<|startoftext|>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"lacks '<\|startoftext\|>'"):
        Tokenizer.open(folder)


def test_an_added_token_that_the_vocabulary_lacks_is_refused(folder: Path) -> None:
    added = {"49408": {"content": "<cat-toy>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(TokenizerError, match="lacks '<cat-toy>'"):
        Tokenizer.open(folder)


@pytest.mark.parametrize("token", [7, "", {"lstrip": False}, ["!"]])
def test_a_special_token_without_a_text_is_refused(folder: Path, token: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
    with pytest.raises(TokenizerError, match="needs a text"):
        Tokenizer.open(folder)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="holds a WordLevel that is not CLIP's"):
        Tokenizer.open(tmp_path)
