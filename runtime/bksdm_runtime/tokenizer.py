# tokenizers' stubs carry no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""CLIP's byte-pair tokenizer, from a bundle's tokenizer folder.

The reference is the CLIPTokenizer that a diffusers pipeline runs on transformers 4 (without ftfy, which diffusers does
not install): the ids are its ids, on the same Python, for every string tried but one odd class (*). The text is cleaned
here as its BasicTokenizer does; splitting and merging are the `tokenizers` library's.

How other CLIP tokenizers differ from that reference, and so from this one. In brackets: of the 6,047 strings of the
test, half of them random characters, how many get other ids. The reference itself: none.

- transformers 4's CLIPTokenizerFast (1,079) and transformers 5's CLIPTokenizer (1,099)
  - keep control, format, private-use and unassigned characters (categories C*), where the reference drops them: the
    zero-width joiner inside emoji, soft hyphens, byte order marks, direction marks; also U+FFFD;
  - take vertical tab, form feed, U+001C-001F and U+0085 for spaces, where the reference drops them and joins the words;
  - do not set each CJK ideograph apart as a word of its own;
  - write a capital sigma at a word's end as a medial small one; do not take a long s for an s in a contraction; keep
    the iota below (U+0345), which falls through the reference's pattern;
  - transformers 5 alone: read a start or end mark typed in capitals as letters.
- transformers 4's CLIPTokenizer with ftfy installed (1,405) drops and sets apart nothing either, and repairs the text
  first: straight quotes for curly ones, plain letters for ligatures, digraphs, full-width and half-width forms, html
  entities decoded, mojibake undone.
- OpenAI's own SimpleTokenizer does what ftfy does, and decodes html entities twice over (by its source, not measured).

(*) A start or end mark typed in capitals right after punctuation: here it is the mark, to the reference punctuation and
letters. And characters that Python's unicodedata knows, but not the older table inside `tokenizers`, may split
differently (none on Python 3.11: every assigned character was compared, of ideographs and hangul every 40th).
"""

import bisect
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers

from bksdm_runtime import strict_json

LENGTH = 77  # positions of CLIP's text encoder
_START, _END = "<|startoftext|>", "<|endoftext|>"
# OpenAI CLIP's pattern. It ignores case even after lower-casing, and so, in the `regex` library that the reference
# uses, a long s is an s in a contraction, and the iota below (U+0345, whose capital is a letter) matches nothing.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
_END_OF_WORD = "</w>"
# CJK ideographs as BERT's BasicTokenizer counts them (kana and hangul are not among them)
_IDEOGRAPHS = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


class TokenizerError(Exception):
    """The tokenizer folder cannot be read; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt for the text encoder.

    ids: [77] int32: start, text, end, padding. dropped: the end of the text that did not fit, as written ("" mostly).
    """

    ids: NDArray[np.int32]
    dropped: str


class Tokenizer:
    """Turns prompts into token ids; open() makes one."""

    def __init__(self, model: models.BPE, start: str, end: str, pad: str, specials: Iterable[str]) -> None:
        specials = sorted({start, end, pad, *specials}, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(re.escape(special) for special in specials) + ")")
        self._tokenizer = tokenizers.Tokenizer(model)
        self._start, self._end, self._pad = (self._id(token) for token in (start, end, pad))
        for special in specials:
            self._id(special)
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in specials])
        words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Read a tokenizer folder: tokenizer.json, or else vocab.json and merges.txt; special tokens from the configs.

        Raises TokenizerError when files are missing, damaged, or of another kind of tokenizer.
        """
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # transformers: an older folder, whose special_tokens_map.json rules
            config |= _read_json(folder / "special_tokens_map.json")
        end, pad, unknown = (_special(config, name, _END) for name in ("eos_token", "pad_token", "unk_token"))
        added = config.get("added_tokens_decoder")
        more = [_text(token) for token in added.values()] if isinstance(added, Mapping) else []
        return cls(_read_model(folder, unknown), _special(config, "bos_token", _START), end, pad, [unknown, *more])

    def encode(self, text: str) -> Tokens:
        """Encode a prompt as [77] ids, cutting what does not fit (also inside a word, as transformers does)."""
        encoding = self._tokenizer.encode(self._clean(text), add_special_tokens=False)
        tokens: list[int] = encoding.ids
        offsets: list[tuple[int, int]] = encoding.offsets
        kept = tokens[: LENGTH - 2]
        ids = np.full(LENGTH, self._pad, np.int32)
        ids[: len(kept) + 2] = [self._start, *kept, self._end]
        return Tokens(ids, self._after(text, offsets[len(kept)][0]) if len(kept) < len(tokens) else "")

    def _clean(self, text: str) -> str:
        """Normalise the text; special tokens written in it are left alone and stand apart."""
        pieces = self._specials.split(text)  # every second one is a special token
        return " ".join(piece if i % 2 else _clean_words(piece) for i, piece in enumerate(pieces)).strip()

    def _after(self, text: str, length: int) -> str:
        """The end of the text whose cleaned form starts after `length` characters of the whole cleaned form."""

        def cleaned_length(end: int) -> int:
            return len(self._clean(text[:end]))

        bound = length + 1
        while bound < len(text) and cleaned_length(bound) <= length:
            bound *= 2
        return text[bisect.bisect_right(range(min(bound, len(text)) + 1), length, key=cleaned_length) - 1 :]

    def _id(self, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise TokenizerError(f"the tokenizer's vocabulary lacks {token!r}, which its settings name: export it anew")
        return found


def _clean_words(text: str) -> str:
    """transformers' BasicTokenizer(strip_accents=False, do_split_on_punc=False): words joined by single spaces."""
    if not text.isascii() or not text.isprintable():
        text = _IDEOGRAPHS.sub(r" \1 ", "".join(_clean_character(character) for character in text))
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split()).lower()


def _clean_character(character: str) -> str:
    category = unicodedata.category(character)
    if character in "\t\n\r" or category == "Zs":
        return " "
    return "" if category.startswith("C") or character == "\N{REPLACEMENT CHARACTER}" else character


def _read_model(folder: Path, unknown: str) -> models.BPE:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    where = str(whole) if whole.is_file() else f"{vocabulary} with {merges.name}"
    try:
        if whole.is_file():
            model: object = tokenizers.Tokenizer.from_file(str(whole)).model
        else:
            for path in (vocabulary, merges):
                if not path.is_file():
                    raise TokenizerError(
                        f"the tokenizer folder {folder} has no {whole.name}, and no {path.name} either"
                    )
            options = {"unk_token": unknown, "end_of_word_suffix": _END_OF_WORD}
            model = models.BPE.from_file(str(vocabulary), str(merges), **options)
            _check_merges(tokenizers.Tokenizer(model).get_vocab_size(), merges)
    except TokenizerError:
        raise
    except Exception as error:  # all that `tokenizers` raises for a file it cannot read
        raise TokenizerError(f"the tokenizer {where} cannot be read: {_reason(error)}") from None
    if not isinstance(model, models.BPE) or model.end_of_word_suffix != _END_OF_WORD:
        raise TokenizerError(
            f"{where} holds a {type(model).__name__} that is not CLIP's, with {_END_OF_WORD!r} word ends"
        )
    return model


def _check_merges(size: int, merges: Path) -> None:
    """Refuse a list of merges cut short, which still reads well: every token is a byte, a merge or a special one."""
    bytes_and_specials = 2 * 256 + 4
    lines = merges.read_text(encoding="utf-8").splitlines()
    found = sum(not line.startswith("#version") for line in lines)
    if found < size - bytes_and_specials:
        raise TokenizerError(
            f"{merges} has {found} merges, but a vocabulary of {size} tokens needs more: fetch it anew"
        )


def _read_json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}  # optional: CLIPTokenizer's defaults stand
    try:
        return strict_json.parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"the tokenizer file {path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _special(config: Mapping[str, object], name: str, default: str) -> str:
    value = config.get(name)
    return default if value is None else _text(value)


def _text(token: object) -> str:
    """The text of a special token, written bare or as an AddedToken object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"the tokenizer's settings name {token!r} as a special token: it needs a text")
    return content
