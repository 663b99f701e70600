"""Low-rank adapters (LoRA, arXiv 2106.09685) from a file, added to the weights of a checkpoint.

Read are diffusers' layouts, old and new, PEFT's and kohya's. Names are looked up among the model's own modules instead
of going through diffusers' converters: those replace substrings and let pass what they do not know, and kohya's, which
is private, guesses where an underscore was a dot. tests/bksdm/test_lora.py holds every layout against diffusers' own
loader."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bksdm import block_removal, licence, weights_file
from bksdm.checkpoint import Checkpoint
from bksdm.components import CLIP_PREFIX, with_clip_prefix
from bksdm.errors import CheckpointError
from bksdm.licence import UNKNOWN, Licence
from bksdm.unet import build_unet, unet_config
from bksdm.variants import VARIANTS, Variant

logger = logging.getLogger(__name__)

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name: in a folder of that kind, the adapters
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in the header
_PARTS = ("unet", "text_encoder")
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
# "<module>.lora_A.weight" (PEFT; its adapter may be named), "<module>.lora.down.weight" (diffusers, the U-Net),
# "<module>.lora_linear_layer.down.weight" (diffusers, the text encoder), "<module>_lora.down.weight" (diffusers before
# 0.22), "<module>.lora_down.weight" and "<module>.alpha" (kohya)
_KEY = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.default(?:_\d+)?)?\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
# What decides whether two U-Nets have the same blocks; widths do not.
_STRUCTURE = ("down_block_types", "up_block_types", "layers_per_block", "mid_block_type")
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Adapter:
    """One module's tensors, and the keys that they had in the file."""

    keys: dict[str, str]
    tensors: dict[str, Tensor]


def merge(checkpoint: Checkpoint, file: Path, scale: float = 1.0, *, partial: bool = False) -> Checkpoint:
    """The checkpoint with W + scale alpha / rank B A in the place of every adapted weight W, computed in float32.

    file: safetensors, or a folder with diffusers' FILE. Without an alpha it is the rank. Every tensor of the file is
    used. partial: of adapters for the full model take those whose blocks this student kept, each at the place to which
    its block moved. Weights without an adapter are shared with `checkpoint`, which is left as it is.
    Raises CheckpointError."""
    path = Path(file) / FILE if Path(file).is_dir() else Path(file)
    if not math.isfinite(scale):
        raise CheckpointError(f"{path} cannot be merged at scale {scale}: give a finite number")
    if path.suffix in weights_file.PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is loaded: look for a .safetensors file of it"
        )
    tensors = weights_file.read(path)
    header = weights_file.metadata(path)
    adapters, left = _placed(checkpoint, _adapters(path, tensors), path, partial=partial)
    alphas = _Alphas(header, path)
    parts: dict[str, nn.Module] = {"unet": checkpoint.unet, "text_encoder": checkpoint.text_encoder}
    changed: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for (part, module), adapter in adapters.items():
        weight = cast(Tensor, parts[part].get_submodule(module).weight)
        added = _product(adapter, weight, alphas, f"{part}.{module}", path)
        merged = weight.detach().float() + scale * added
        if not torch.isfinite(merged).all():
            raise CheckpointError(
                f"{path}: {adapter.keys['down']} at scale {scale:g} makes {module} NaN or infinite: it is damaged, or "
                "the scale too large"
            )
        changed[part][module] = merged.to(weight.dtype)
    called = f"{path.resolve().parent.name}/{FILE}" if path.name == FILE else path.name
    share = ""
    if left:
        share = f" ({len(tensors) - left} of {len(tensors)} tensors, the others are of removed blocks)"
        logger.warning("%s: %s", path, share.strip(" ()"))
    return replace(
        checkpoint,
        unet=_with_weights(checkpoint.unet, changed["unet"]),
        text_encoder=_with_weights(checkpoint.text_encoder, changed["text_encoder"]),
        source=f"{checkpoint.source}, with LoRA {called} at scale {scale:g}{share}",
        licence=_terms(checkpoint, path, header, called, scale),
    )


def _adapters(path: Path, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], _Adapter]:
    """The file's tensors by part and by the module's name as the file spells it."""
    found: dict[tuple[str, str], _Adapter] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        place = _part(match["module"]) if match else None
        if not match or not place:
            raise CheckpointError(
                f"{path}: {key} is no tensor of a LoRA for the U-Net or text encoder of Stable Diffusion 1 or 2 (those "
                "of DoRA, LoHa, LoKr and of other models cannot be merged)"
            )
        role = {"A": "down", "B": "up"}.get(match["peft"]) or match["diffusers"] or match["kohya"] or match["alpha"]
        adapter = found.setdefault(place, _Adapter({}, {}))
        if role in adapter.keys:
            raise CheckpointError(f"{path} has {adapter.keys[role]} and {key}, which are the same: it is damaged")
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {key} holds NaN, infinite or no real numbers: the file is damaged")
        adapter.keys[role], adapter.tensors[role] = key, tensor
    for adapter in found.values():
        for role, other in (("down", "up"), ("up", "down")):
            if role not in adapter.keys:
                have = adapter.keys.get(other) or adapter.keys["alpha"]
                raise CheckpointError(f"{path}: {have} comes without its {role} tensor: the file is not whole")
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    return found


def _part(written: str) -> tuple[str, str] | None:
    """Which part of the model a name in a file begins with, and the rest of it."""
    for prefix, part in _KOHYA.items():
        if written.startswith(prefix):
            return part, written.removeprefix(prefix)
    first, _, rest = written.replace(".processor.", ".").partition(".")
    if first in _PARTS and rest:
        return first, rest
    if first in ("down_blocks", "mid_block", "up_blocks"):  # files of the U-Net alone, before there were prefixes
        return "unet", f"{first}.{rest}"
    return None


def _placed(
    checkpoint: Checkpoint, adapters: Mapping[tuple[str, str], _Adapter], path: Path, *, partial: bool
) -> tuple[dict[tuple[str, str], _Adapter], int]:
    """The adapters by part and the model's own name of the module, and how many tensors have no place in it."""
    known = {
        "unet": _spellings(_adaptable(checkpoint.unet)),
        "text_encoder": _text_spellings(_adaptable(checkpoint.text_encoder)),
    }
    strange = {place: adapter for place, adapter in adapters.items() if place[1] not in known[place[0]]}
    if not strange:
        return {(part, known[part][name]): adapter for (part, name), adapter in adapters.items()}, 0
    moved = _moved(checkpoint.unet) or {}
    outside = [adapter for (part, name), adapter in strange.items() if part != "unet" or name not in moved]
    if outside:
        raise CheckpointError(
            f"{path}: {len(_keys(outside))} of {len(_keys(adapters.values()))} tensors have no place in "
            f"{checkpoint.source}, {_keys(outside)[0]} first: it was trained on another model"
        )
    if not partial:
        raise CheckpointError(
            f"{path}: {len(_keys(strange.values()))} of {len(_keys(adapters.values()))} tensors have no place in "
            f"{checkpoint.source}, {_keys(strange.values())[0]} first: it was trained on the full model, whose blocks "
            "this one lacks; --lora-partial merges what fits"
        )
    placed: dict[tuple[str, str], _Adapter] = {}
    left = 0
    for (part, name), adapter in adapters.items():
        own = moved[name] if part == "unet" else known[part][name]
        if own is None:
            left += len(adapter.keys)
        else:
            placed[part, own] = adapter
    return placed, left


def _keys(adapters: Iterable[_Adapter]) -> list[str]:
    return [key for adapter in adapters for key in adapter.keys.values()]


def _adaptable(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """What files call a module -> its name."""
    spelt = {}
    for name in names:
        old = name.removesuffix(".0") if name.endswith(".to_out.0") else name
        spelt.update({name: name, name.replace(".", "_"): name, old: name})
    return spelt


def _text_spellings(names: Iterable[str]) -> dict[str, str]:
    spelt = {}
    for name in names:
        full = with_clip_prefix(name)
        parent, _, last = full.rpartition(".")
        old = f"{parent}.{_OLD_TEXT.get(last, last)}"
        spelt.update(dict.fromkeys((full, full.removeprefix(CLIP_PREFIX), full.replace(".", "_"), old), name))
    return spelt


def _moved(student: UNet2DConditionModel) -> dict[str, str | None] | None:
    """What files call a module of the full model -> the student's name of it, None where its block was removed.

    None for a U-Net that is no student of a known rule. Layers and stages that stay may be numbered otherwise in the
    student, so that names alone would put adapters on weights that they were not trained with."""
    row = _rule(student)
    if row is None:
        return None
    full = row.architecture.unet
    with torch.device("meta"):
        names = _adaptable(build_unet(full))
    blocks = {block.name: block.student for block in block_removal.blocks(full, row.removal)}

    def own(name: str) -> str | None:
        block = next(block for block in blocks if f"{name}.".startswith(f"{block}."))
        kept = blocks[block]
        return None if kept is None else kept + name.removeprefix(block)

    return {spelling: own(name) for spelling, name in _spellings(names).items()}


def _rule(student: UNet2DConditionModel) -> Variant | None:
    """The row by whose rule this U-Net lost its blocks, at whatever width."""
    for row in VARIANTS.values():
        if row.teacher:
            config = unet_config(row.architecture.unet, row.removal)
            if all(_plain(student.config[key]) == _plain(config[key]) for key in _STRUCTURE):
                return row
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Alphas:
    """Alpha over rank of each adapter: from its own tensor, else from PEFT's settings in the header, else 1."""

    def __init__(self, header: Mapping[str, str], path: Path) -> None:
        try:
            settings = json.loads(header.get(_METADATA, "{}"))
            self.settings = {part: self._of(part, settings) for part in _PARTS}
        except (ValueError, TypeError, AttributeError, re.error) as reason:
            raise CheckpointError(f"{path}: its header's {_METADATA} is damaged ({reason})") from reason
        if any(settings.get("use_dora") for settings in self.settings.values()):
            raise CheckpointError(f"{path} is a DoRA, which cannot be merged: look for a LoRA")

    def _of(self, part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
        if "lora_alpha" in own:
            own["lora_alpha"] = float(own["lora_alpha"])
        own["alpha_pattern"] = {re.compile(rf"(.*\.)?({k})"): float(v) for k, v in own.get("alpha_pattern", {}).items()}
        return own

    def scale(self, adapter: _Adapter, name: str, rank: int) -> float:
        """name: "unet.<module>". Patterns are regular expressions of a name's end, as PEFT reads them."""
        if "alpha" in adapter.tensors:
            return adapter.tensors["alpha"].item() / rank
        part, _, module = name.partition(".")
        settings = self.settings[part]
        alpha = settings.get("lora_alpha", float(rank))
        alpha = next((value for key, value in settings["alpha_pattern"].items() if key.fullmatch(module)), alpha)
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _product(adapter: _Adapter, weight: Tensor, alphas: _Alphas, name: str, path: Path) -> Tensor:
    """alpha / rank B A in the shape of the weight, float32."""
    down, up, alpha = (adapter.tensors.get(role) for role in ("down", "up", "alpha"))
    if down is None or up is None:
        raise ValueError(f"{name} is not whole")
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(f"{path}: {adapter.keys['alpha']} is {tuple(alpha.shape)}, expected one number")
    rank = down.shape[0] if down.ndim else 0
    expected = {"down": (rank, *_trimmed(weight.shape)[1:]), "up": (weight.shape[0], rank)}
    for role, tensor in (("down", down), ("up", up)):
        if not rank or _trimmed(tensor.shape) != expected[role]:
            raise CheckpointError(
                f"{path}: {adapter.keys[role]} is {tuple(tensor.shape)}, which does not fit {name} "
                f"{tuple(weight.shape)} at rank {rank}: it was trained on a model of another width"
            )
    # A convolution's A is one itself, and its B one of 1x1: as matrices their product is the whole kernel.
    product = up.float().flatten(1) @ down.float().flatten(1)
    return alphas.scale(adapter, name, rank) * product.view(weight.shape)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without a kernel of 1x1: tools write a linear layer's adapter as such a convolution, and the other way round."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def _with_weights(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """The model with other weights of these modules; all other tensors are shared with it."""
    if not weights:
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, shared)
    for name, weight in weights.items():
        changed.get_submodule(name).weight = nn.Parameter(weight)
    return changed


def _terms(checkpoint: Checkpoint, path: Path, header: Mapping[str, str], called: str, scale: float) -> Licence:
    """Both licences, and that the weights were changed (paragraph 4 of the OpenRAIL licences asks for it)."""
    own = licence.of_header(header, called)
    if own.name == UNKNOWN:
        own = licence.of_folder(path.parent) or own
    terms = licence.joined(checkpoint.licence, own)
    changed = f"Changed: the LoRA {called} was merged at scale {scale:g} into the weights of {checkpoint.source}."
    return replace(terms, notice=f"{changed}\n\n{terms.notice}")
