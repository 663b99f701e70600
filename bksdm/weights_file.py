"""Files that hold tensors: which one to read, whether it is whole, and what is in it.

A pickle can run any code while it is loaded, so safetensors is the only format that is read unasked.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from bksdm.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The weights of one component. files: names in its folder, an index and its shards where it is split up.

    variant: "fp16" for a half-precision twin, else None. pickled: not safetensors.
    """

    files: tuple[str, ...]
    variant: str | None = None
    pickled: bool = False


def choose(names: Iterable[str], *, where: str, allow_pickle: bool = False) -> Choice:
    """Pick the best weights among the file names of one component's folder.

    Full-precision safetensors first, whole or in shards, then the fp16 twin, then (only with allow_pickle) pickles in
    the same order. where: what an error calls the folder. Raises CheckpointError.
    """
    names = sorted(names)
    stems = ("diffusion_pytorch_model", "model")
    for variant in (None, "fp16"):
        for stem in stems:
            if found := _named(names, stem, variant, "safetensors"):
                return Choice(found, variant)
    pickles = [
        Choice(found, variant, pickled=True)
        for variant in (None, "fp16")
        for stem in ("diffusion_pytorch_model", "pytorch_model")
        if (found := _named(names, stem, variant, "bin"))
    ]
    if not pickles:
        raise CheckpointError(f"{where} has no weights (a .safetensors file)")
    if not allow_pickle:
        raise CheckpointError(_refusal(f"{where}/{pickles[0].files[0]}"))
    return pickles[0]


def read(path: Path, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of one file, on the CPU; a safetensors file is mapped, not copied. Raises CheckpointError."""
    if path.suffix == ".safetensors":
        shapes(path)  # an unreadable file ends here, in a sentence
        return load_file(str(path))
    if path.suffix not in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path} is not a weights file: expected .safetensors")
    if not allow_pickle:
        raise CheckpointError(_refusal(str(path)))
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as reason:  # bytes that are no pickle end in whatever they happen to decode to
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: it is damaged, or holds objects which only an unsafe load makes "
            "(a training's callbacks): look for a .safetensors file of the same model"
        ) from reason
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # LDM's .ckpt files wrap the weights in a training state
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes in a safetensors file, from its header. Raises CheckpointError if it is damaged or cut short."""
    try:
        with path.open("rb") as file:  # safetensors would say of any file that it may not read that there is none
            start = file.read(7)
    except FileNotFoundError as reason:
        raise CheckpointError(f"there is no {path}") from reason
    except OSError as reason:
        raise CheckpointError(f"{path} cannot be read ({reason.strerror})") from reason
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as reason:
        if start == b"version":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull") from reason
        raise CheckpointError(
            f"{path} is damaged or cut short ({path.stat().st_size} bytes; {reason}): download or copy it again"
        ) from reason


def metadata(path: Path) -> dict[str, str]:
    """The free-form text entries of a safetensors header."""
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def check(folder: Path, choice: Choice) -> None:
    """Every file of `choice` is there and whole. Raises CheckpointError."""
    files = set(choice.files)
    for name in choice.files:
        path = folder / name
        if name.endswith(".index.json"):
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
                files.update(Path(shard).name for shard in shards)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
                raise CheckpointError(f"{path} is not an index of shards") from reason
    for name in sorted(files):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
        if name.endswith(".safetensors"):
            shapes(folder / name)


def _named(names: list[str], stem: str, variant: str | None, suffix: str) -> tuple[str, ...]:
    infix = f".{variant}" if variant else ""
    if (whole := f"{stem}{infix}.{suffix}") in names:
        return (whole,)
    # diffusers names an fp16 index "<stem>.safetensors.index.fp16.json", transformers "<stem>.fp16.safetensors..."
    for index in (f"{stem}.{suffix}.index{infix}.json", f"{stem}{infix}.{suffix}.index.json"):
        if index in names:
            shard = re.compile(rf"{re.escape(stem + infix)}-\d+-of-\d+\.{suffix}")
            return (index, *(name for name in names if shard.fullmatch(name)))
    return ()


def _refusal(path: str) -> str:
    source = Path(path)
    why = f"{path} is a pickle, which can run code when it is loaded"
    if not source.exists():  # in a repository on the Hub
        return f"{why}: pass --allow-pickle to read its tensors alone"
    safe = source.with_name(f"{'model' if source.stem == 'pytorch_model' else source.stem}.safetensors")
    at, to = (json.dumps(str(place), ensure_ascii=False) for place in (source, safe))
    # LDM's .ckpt files wrap the weights in a training state, and safetensors takes neither numbers nor shared memory.
    convert = (
        f'import torch, safetensors.torch as s; t = torch.load({at}, map_location="cpu", weights_only=True); '
        't = t.get("state_dict", t); '
        f"s.save_file({{k: v.clone().contiguous() for k, v in t.items() if torch.is_tensor(v)}}, {to})"
    )
    return (
        f"{why}: convert it to safetensors with python -c {shlex.quote(convert)}, "
        "or pass --allow-pickle to read its tensors alone"
    )
