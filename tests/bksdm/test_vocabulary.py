"""Tokenizers with tokens of their own: a textual inversion's ids are the same before and after a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, CLIPTokenizerFast

from bksdm import checkpoint, vocabulary
from bksdm.checkpoint import Checkpoint, CheckpointError
from bksdm_runtime import tokenizer as runtime

PROMPT = "a <cat-toy> on a<My-Dog>, cat toy"
IDS = [49406, 320, 49408, 525, 320, 49409, 267, 2368, 5988, 49407]


def grown() -> CLIPTokenizer:
    words = checkpoint.tokenizer()
    assert words.add_tokens(["<cat-toy>", "<My-Dog>"]) == 2
    assert words(PROMPT).input_ids == IDS
    return words


def test_tokens_of_a_textual_inversion_keep_their_ids_in_every_reader(tmp_path: Path) -> None:
    vocabulary.save(grown(), tmp_path)
    assert vocabulary.load(tmp_path)(PROMPT).input_ids == IDS
    assert CLIPTokenizer.from_pretrained(tmp_path)(PROMPT).input_ids == IDS
    assert CLIPTokenizerFast.from_pretrained(tmp_path)(PROMPT).input_ids == IDS
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(PROMPT).ids == IDS
    assert runtime.Tokenizer.open(tmp_path).encode(PROMPT).ids[: len(IDS)].tolist() == IDS


def test_they_survive_a_second_save_and_one_form_alone(tmp_path: Path) -> None:
    vocabulary.save(grown(), tmp_path / "first")
    vocabulary.save(vocabulary.load(tmp_path / "first"), tmp_path / "second")
    for name in ("vocab.json", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "second" / name).unlink()
    assert vocabulary.load(tmp_path / "second")(PROMPT).input_ids == IDS
    shutil.rmtree(tmp_path / "second")
    grown().save_pretrained(tmp_path / "second")  # as transformers itself leaves it
    assert vocabulary.load(tmp_path / "second")(PROMPT).input_ids == IDS


def test_a_text_encoder_with_room_for_them_is_saved_and_loaded(
    build_mini: Callable[..., Checkpoint],
    tmp_path: Path,
    assert_same_tensors: Callable[[Checkpoint, Checkpoint], None],
) -> None:
    whole = replace(build_mini(text_encoder={"vocab_size": 49410}), tokenizer=grown())
    checkpoint.save(whole, tmp_path / "inverted")
    loaded = checkpoint.load(str(tmp_path / "inverted"))
    assert_same_tensors(loaded, whole)
    assert loaded.tokenizer(PROMPT).input_ids == IDS


def test_a_text_encoder_without_room_for_them_is_refused(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(replace(mini_checkpoint, tokenizer=grown()), tmp_path / "inverted")
    with pytest.raises(CheckpointError, match="the tokenizer has 49410 tokens, the text encoder 49408"):
        checkpoint.load(str(tmp_path / "inverted"))


def test_tokens_that_would_not_be_read_back_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "load", lambda folder: checkpoint.tokenizer())
    with pytest.raises(CheckpointError, match="added token '<My-Dog>' would not be read back as it is"):
        vocabulary.save(grown(), tmp_path)
