"""Which of a component's files is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bksdm import checkpoint
from bksdm.checkpoint import Checkpoint, CheckpointError
from bksdm.weights_file import Choice, choose

FULL = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
PICKLE = "diffusion_pytorch_model.bin"


@pytest.mark.parametrize(
    ("names", "allow_pickle", "expected"),
    [
        ([HALF, FULL, PICKLE], True, Choice((FULL,))),
        ([HALF, PICKLE], True, Choice((HALF,), "fp16")),
        (["diffusion_pytorch_model.non_ema.safetensors", FULL], False, Choice((FULL,))),
        (["model.safetensors", "pytorch_model.bin"], False, Choice(("model.safetensors",))),
        ([PICKLE, "diffusion_pytorch_model.fp16.bin"], True, Choice((PICKLE,), pickled=True)),
        (["pytorch_model.fp16.bin"], True, Choice(("pytorch_model.fp16.bin",), "fp16", pickled=True)),
        (
            [f"{FULL}.index.json", *(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)), HALF],
            False,
            Choice(
                (
                    f"{FULL}.index.json",
                    "diffusion_pytorch_model-00001-of-00002.safetensors",
                    "diffusion_pytorch_model-00002-of-00002.safetensors",
                )
            ),
        ),
    ],
)
def test_full_precision_safetensors_come_first(names: list[str], allow_pickle: bool, expected: Choice) -> None:
    assert choose(names, where="x", allow_pickle=allow_pickle) == expected
    assert choose(reversed(names), where="x", allow_pickle=allow_pickle) == expected


def test_pickles_alone_are_refused_and_nothing_at_all_is_said_so() -> None:
    with pytest.raises(CheckpointError, match=r"x/diffusion_pytorch_model\.bin is a pickle"):
        choose([PICKLE], where="x")
    with pytest.raises(CheckpointError, match="x has no weights"):
        choose(["config.json", "diffusion_pytorch_model.non_ema.safetensors"], where="x")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_half_precision_alone_is_used_and_said(copy: Path, part: str, caplog: pytest.LogCaptureFixture) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    file.unlink()
    with caplog.at_level(logging.WARNING, "bksdm"):
        loaded = checkpoint.load(str(copy))
    assert f"{part}: only the half-precision file ({file.stem}.fp16.safetensors) exists" in caplog.text
    assert next(loaded.unet.parameters()).dtype == torch.float32


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_shards_are_read_whole_and_a_missing_one_is_named(
    copy: Path, mini_checkpoint: Checkpoint, part: str, assert_same_tensors: Callable[[Checkpoint, Checkpoint], None]
) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    index = {}
    for number in (0, 1):
        shard = f"{file.stem}-0000{number + 1}-of-00002.safetensors"
        inside = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % 2 == number}
        save_file(inside, copy / part / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(inside, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (copy / part / f"{file.name}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    assert_same_tensors(checkpoint.load(str(copy)), mini_checkpoint)
    (copy / part / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"{shard} is missing"):
        checkpoint.load(str(copy))
