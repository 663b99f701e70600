"""CLIP's byte-pair vocabulary, read and written in every form that a reader may ask for.

transformers 4 reads vocab.json and merges.txt, transformers 5 writes tokenizer.json alone, and torch-free readers want
tokenizer.json: a checkpoint of ours carries all three.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer, CLIPTokenizerFast

from bksdm.errors import CheckpointError, first_line

CLIP_FOLDER = Path(__file__).parent / "clip_tokenizer"
_TOKEN_SETTINGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
TOKENS = 77  # CLIP's context length, the only one that SD 1 and SD 2 were trained with


def clip(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of SD 1 (pads with the end of text) and, with pad_token="!", of SD 2: 49,408 tokens."""
    return CLIPTokenizer.from_pretrained(str(CLIP_FOLDER), pad_token=pad_token)


def load(folder: Path) -> CLIPTokenizer:
    """Read a checkpoint's tokenizer/ folder, also one that holds tokenizer.json alone."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_pretrained(folder, folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json")
    with tempfile.TemporaryDirectory() as rebuilt:
        for file in folder.glob("*.json"):
            (Path(rebuilt) / file.name).write_bytes(file.read_bytes())
        try:
            _write_bpe(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), Path(rebuilt))
        except (ValueError, KeyError, TypeError) as reason:
            raise CheckpointError(f"{folder / 'tokenizer.json'} is not a CLIP byte-pair tokenizer") from reason
        return _from_pretrained(Path(rebuilt), folder)


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json, merges.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    Tokens that a tokenizer gained (textual inversion) keep their ids. Raises CheckpointError where they would not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    added = dict(tokenizer.get_added_vocab())
    grown = set(added) - set(clip().get_vocab())
    if grown:  # where transformers 4 and the runtime look for them; in the vocabularies too, which the runtime asks for
        settings["added_tokens_decoder"] = {
            str(number): {name: getattr(token, name) for name in _TOKEN_SETTINGS}
            for number, token in sorted(tokenizer.added_tokens_decoder.items())
        }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    if isinstance(tokenizer, CLIPTokenizerFast):  # also true of transformers 5's CLIPTokenizer
        backend = tokenizer.backend_tokenizer
        _write_bpe(json.loads(backend.to_str()), folder)
    else:
        tokenizer.save_vocabulary(str(folder))
        backend = CLIPTokenizerFast.from_pretrained(str(folder)).backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    if grown:
        specification = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        specification["model"]["vocab"] |= added
        (folder / "tokenizer.json").write_text(json.dumps(specification, ensure_ascii=False), encoding="utf-8")
        _write_bpe(specification, folder)
        _check_grown(tokenizer, sorted(grown), folder)


def _from_pretrained(folder: Path, named: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(str(folder))
    except Exception as reason:  # transformers lets json, unicode, key and OS errors through, each in its own type
        raise CheckpointError(f"{named} is not a readable CLIP tokenizer ({first_line(reason)})") from reason


def _check_grown(tokenizer: CLIPTokenizer, grown: list[str], folder: Path) -> None:
    """Tokens that do not stand in the vocabulary are where readers of tokenizers differ: read them back."""
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    again = load(folder)
    for token in grown:
        ids = tokenizer(f"a {token} b").input_ids
        if again(f"a {token} b").input_ids != ids or alone.token_to_id(token) != tokenizer.get_added_vocab()[token]:
            raise CheckpointError(f"the tokenizer's added token {token!r} would not be read back as it is")


def _write_bpe(specification: dict, folder: Path) -> None:
    model = specification["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
