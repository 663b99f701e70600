"""A checkpoint: the whole text-to-image model in torch, wherever it came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from bksdm import (
    components,
    diffusers_folder,
    hub,
    licence,
    random_weights,
    single_file,
    variants,
    vocabulary,
    weights_file,
)
from bksdm.components import Components
from bksdm.errors import CheckpointError, first_line
from bksdm.licence import Licence
from bksdm.unet import unet_config
from bksdm.variants import VARIANTS, Variant

__all__ = ["Checkpoint", "CheckpointError", "Licence", "demo_folder", "load", "save", "tokenizer", "variant_of"]

CUSTOM = "custom"
# What Stable Diffusion and BK-SDM are published and scored with, and what their users expect where nothing is said.
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class Checkpoint:
    """The whole model, in eval mode, float32, on the CPU.

    variant: the name of a row of bksdm.variants, or "custom" (another width, for instance the demo).
    source: "nota-ai/bk-sdm-small@<revision>", the name of a folder or file, "demo", or "random(small, seed=0)".
    image_size: default height and width in pixels; guidance_scale: what the model is meant to be sampled with.
    """

    variant: str
    source: str
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, object]
    licence: Licence
    image_size: int
    guidance_scale: float = GUIDANCE_SCALE


@contextmanager
def _os_errors_said() -> Iterator[None]:
    """A folder that may not be entered, a name that is too long: met at any look at a path."""
    try:
        yield
    except OSError as reason:
        raise CheckpointError(f"{reason.filename} cannot be read ({reason.strerror or first_line(reason)})") from reason


@_os_errors_said()
def load(
    weights: str | None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    unet: str | None = None,
    allow_pickle: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """Load a whole model, in one of five ways.

    weights: None - the variant's published weights from the Hub (at `revision`); "demo" - the project's own model;
        "random" - the variant's true architecture with weights drawn from `seed`; a folder in diffusers' layout; or one
        .safetensors file under LDM keys.
    variant: a row of bksdm.variants. Needed for the Hub and for "random"; otherwise a claim that is checked.
    unet: a folder with a trained U-Net, laid over that model.
    allow_pickle: read pickled weights too, as plain tensors (weights_only). Raises CheckpointError and VariantError.
    """
    row = None if variant is None else variants.get(variant)
    if revision is not None and weights is not None:
        raise CheckpointError(f"a revision names a commit on the Hub, and {weights} is not from there")
    overlay = None
    if unet is not None:
        if not Path(unet).exists():
            raise CheckpointError(f"there is no {unet}: expected a folder with a trained U-Net")
        overlay = diffusers_folder.load_unet(Path(unet), allow_pickle=allow_pickle)
    said: Mapping[str, object] = {}
    if weights == "random":
        parts, source, terms, claimed = _random(row, seed)
    elif weights is None:
        parts, source, terms, claimed = _from_hub(row, revision, overlay, allow_pickle=allow_pickle)
    elif (path := demo_folder() if weights == "demo" else _existing(Path(weights))).is_dir():
        parts, source, terms, claimed = _from_folder(path, overlay, allow_pickle=allow_pickle)
        source = "demo" if weights == "demo" else source
        said = diffusers_folder.record(path)
    else:
        architecture = row.architecture if row else None
        parts = single_file.load(path, architecture=architecture, allow_pickle=allow_pickle)
        entries = weights_file.metadata(path) if path.suffix == ".safetensors" else {}
        source, claimed = _called(path), None
        terms = licence.of_header(entries, source)
    if row is not None and terms.name == licence.UNKNOWN:
        terms = licence.of_variant(row.licence, row.name, source)
    if unet is not None and overlay is not None:
        parts = dataclasses.replace(parts, unet=overlay)
        source = f"{source} with the U-Net of {_called(Path(unet))}"
        if own := _licence_of_unet(Path(unet)):
            terms = licence.with_part(terms, own, "U-Net")
    where = source  # in errors, unlike in records, a path is a path
    if weights not in (None, "demo", "random"):
        where = str(weights) if unet is None else f"{weights} with the U-Net of {unet}"
    size = components.image_size(parts, where)
    return Checkpoint(
        variant=_name(row, claimed, parts.unet, where),
        source=source,
        text_encoder=parts.text_encoder,
        unet=parts.unet,
        vae=parts.vae,
        tokenizer=parts.tokenizer,
        scheduler_config=parts.scheduler_config,
        licence=terms,
        image_size=size,
        guidance_scale=_guidance_scale(said, where),
    )


def save(checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a full diffusers checkpoint (safetensors only, tokenizer in all its forms, licence) as `folder`.

    Written beside `folder` and renamed when whole, so that a kill at any moment leaves no half checkpoint. An existing
    checkpoint is replaced; a folder that holds anything else is refused. dtype: of the stored weights, None keeps them.
    Raises CheckpointError.
    """
    diffusers_folder.save(checkpoint, folder, dtype=dtype)


def variant_of(unet: UNet2DConditionModel, *, claimed: str | None = None) -> str:
    """The row whose U-Net this is, or "custom". claimed: preferred where it fits, as rows can share an architecture."""
    names = [claimed, *VARIANTS] if claimed in VARIANTS else list(VARIANTS)
    return next((name for name in names if name and not _difference(VARIANTS[name], unet)), CUSTOM)


def demo_folder() -> Path:
    """<repository>/checkpoints/demo. Raises CheckpointError where there is none (an installed wheel)."""
    folder = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
    if not (folder / diffusers_folder.INDEX).is_file():
        raise CheckpointError(
            "the demo checkpoint ships with the repository, not with the wheel: clone the repository, "
            "or name other weights (a folder, a .safetensors file, or random)"
        )
    return folder


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer, 49,408 tokens, from the vocabulary in this package; SD 2 pads with "!"."""
    return vocabulary.clip(pad_token)


_Loaded = tuple[Components, str, Licence, str | None]  # parts, source, licence, the variant that their own record names


def _from_hub(
    row: Variant | None, revision: str | None, overlay: UNet2DConditionModel | None, *, allow_pickle: bool
) -> _Loaded:
    if row is None:
        raise CheckpointError(f"weights from the Hub need a variant: choose from {', '.join(VARIANTS)}")
    folder, commit = hub.snapshot(row.hub, revision, allow_pickle=allow_pickle, with_unet=overlay is None)
    parts = diffusers_folder.load(folder, unet=overlay, allow_pickle=allow_pickle)
    return parts, f"{row.hub}@{commit}", licence.published(row.licence), row.name


def _from_folder(folder: Path, overlay: UNet2DConditionModel | None, *, allow_pickle: bool) -> _Loaded:
    parts = diffusers_folder.load(folder, unet=overlay, allow_pickle=allow_pickle)
    source = _called(folder)
    claimed = diffusers_folder.record(folder).get("variant")
    terms = _licence_of(folder) or licence.unknown(source)
    return parts, source, terms, claimed if isinstance(claimed, str) else None


def _random(row: Variant | None, seed: int) -> _Loaded:
    if row is None:
        raise CheckpointError(f"random weights need a variant: choose from {', '.join(VARIANTS)}")
    architecture = dataclasses.replace(row.architecture, unet=unet_config(row.architecture.unet, row.removal))
    text_encoder, unet, vae = random_weights.build(architecture, seed)
    words = vocabulary.clip(architecture.pad_token)
    parts = Components(text_encoder, unet, vae, words, dict(architecture.scheduler))
    return parts, f"random({row.name}, seed={seed})", licence.RANDOM, row.name


def _guidance_scale(record: Mapping[str, object], source: str) -> float:
    found = record.get("guidance_scale", GUIDANCE_SCALE)
    if not isinstance(found, (int, float)) or isinstance(found, bool) or not 1 <= found < math.inf:
        raise CheckpointError(f"{source}: its {diffusers_folder.RECORD} says guidance_scale {found}, not 1 or more")
    return float(found)


def _existing(path: Path) -> Path:
    if not path.exists():
        hint = " (a variant's name: leave the weights out to download them)" if str(path) in VARIANTS else ""
        raise CheckpointError(f"there is no {path}{hint}: {hub.OTHER_WAYS}", change="weights")
    return path


def _name(row: Variant | None, claimed: str | None, unet: UNet2DConditionModel, source: str) -> str:
    """The variant asked for, which must fit, or whatever fits."""
    if row is None:
        return variant_of(unet, claimed=claimed)
    if difference := _difference(row, unet):
        raise CheckpointError(f"{source} is not {row.name!r}: {difference}")
    return row.name


def _difference(row: Variant, unet: UNet2DConditionModel) -> str | None:
    for key, expected in unet_config(row.architecture.unet, row.removal).items():
        found = unet.config[key]
        found = list(found) if isinstance(found, tuple) else found
        if found != expected:
            return f"its U-Net has {key} {found}, {row.name} has {expected}"
    return None


def _called(path: Path) -> str:
    """What a path is called in records and notices, which travel: its name, not where this machine keeps it."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "unet" else path.name


def _licence_of(folder: Path) -> Licence | None:
    name = diffusers_folder.record(folder).get("licence")
    return licence.of_folder(folder, name=name if isinstance(name, str) else None)


def _licence_of_unet(folder: Path) -> Licence | None:
    """A bare U-Net's licence lies beside it, or in the checkpoint that it is the unet/ of."""
    whole = folder.resolve().parent
    is_part = (folder / "config.json").is_file() and (whole / diffusers_folder.INDEX).is_file()
    return _licence_of(folder) or (_licence_of(whole) if is_part else None)
