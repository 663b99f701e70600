"""The family as one table: what each variant removes from which teacher, and what its authors published about it.

Torch-free: the table can be read where torch is not installed.

Sources of the figures:
  paper      arXiv 2305.15798 and the model card of github.com/Nota-NetsPresso/BK-SDM (zero-shot MS-COCO 256x256, 30 K
             captions, PNDM, 25 steps, guidance 7.5).
  counted    not printed to the last digit by the authors: counted on the U-Net that the published configuration builds,
             at 64x64 latents (512 px), batch 1, 77 tokens; multiply-accumulates of convolutions and linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bksdm.architecture import SD_V1_4, SD_V2_1, SD_V2_1_BASE, Architecture
from bksdm.errors import VariantError
from bksdm.licence import OPENRAIL_M, OPENRAIL_PLUS_PLUS_M

PAPER = "arXiv 2305.15798; BK-SDM model card (MS-COCO 256x256, 30 K, PNDM 25 steps, guidance 7.5)"


@dataclass(frozen=True)
class Removal:
    """What is taken out of a teacher's U-Net.

    layers: residual-and-attention pairs per stage. A down stage keeps its first ones; an up stage keeps its first ones
        and its last, because the last alone has the width that the next stage expects.
    mid_block: the whole middle.
    stages: innermost stages, of the way down and of the way up; the stage that becomes innermost loses its downsampler.
    """

    layers: int = 0
    mid_block: bool = False
    stages: int = 0


@dataclass(frozen=True)
class Scores:
    """COCO scores as published. fid: lower is better; is_: Inception score; clip: mean cosine, ViT-g/14."""

    fid: float
    is_: float
    clip: float


@dataclass(frozen=True)
class Variant:
    """One row. teacher: the name of the row it was cut from, None for a teacher itself.

    architecture: of its teacher (the U-Net's rule is `removal`). unet_params, macs: of the U-Net, one evaluation at
    512 px; `counted` names those of the two that we counted and the authors did not print. source: of its figures.
    """

    name: str
    family: str
    teacher: str | None
    removal: Removal
    architecture: Architecture
    hub: str
    unet_params: int
    macs: int
    scores: Scores | None
    licence: str = OPENRAIL_M
    counted: tuple[str, ...] = ()
    source: str = PAPER


NOTHING = Removal()
BASE = Removal(layers=1)
SMALL = Removal(layers=1, mid_block=True)
TINY = Removal(layers=1, mid_block=True, stages=1)

_COUNTED = ("unet_params", "macs")


def _student(
    name: str, teacher: Variant, removal: Removal, unet_params: int, macs: int, scores: Scores, *, printed: bool = False
) -> Variant:
    return Variant(
        name=name,
        family=teacher.family,
        teacher=teacher.name,
        removal=removal,
        architecture=teacher.architecture,
        hub=f"nota-ai/bk-sdm-{name}",
        unet_params=unet_params,
        macs=macs,
        scores=scores,
        licence=OPENRAIL_M,  # also the v2 family's model cards
        counted=() if printed else _COUNTED,
    )


SD14 = Variant(
    name="sd-v1.4",
    family="v1",
    teacher=None,
    removal=NOTHING,
    architecture=SD_V1_4,
    hub="CompVis/stable-diffusion-v1-4",
    unet_params=859_520_964,
    macs=338_700_000_000,
    scores=Scores(13.05, 36.76, 0.2958),
)
SD21_BASE = Variant(
    name="sd-v2.1-base",
    family="v2",
    teacher=None,
    removal=NOTHING,
    architecture=SD_V2_1_BASE,
    hub="stabilityai/stable-diffusion-2-1-base",
    unet_params=865_910_724,
    macs=339_102_597_120,
    scores=Scores(13.93, 35.93, 0.3075),
    licence=OPENRAIL_PLUS_PLUS_M,
    counted=_COUNTED,
)
SD21 = Variant(
    name="sd-v2.1",
    family="v2",
    teacher=None,
    removal=NOTHING,
    architecture=SD_V2_1,
    hub="stabilityai/stable-diffusion-2-1",
    unet_params=865_910_724,
    macs=339_102_597_120,
    scores=None,
    licence=OPENRAIL_PLUS_PLUS_M,
    counted=_COUNTED,
    source="counted",
)

# name, teacher, removal, U-Net parameters, multiply-accumulates, (FID, IS, CLIP score)
_ROWS = (
    SD14,
    _student("base", SD14, BASE, 579_384_964, 223_800_000_000, Scores(15.76, 33.79, 0.2878), printed=True),
    _student("small", SD14, SMALL, 482_346_884, 217_645_383_680, Scores(16.98, 31.68, 0.2677)),
    _student("tiny", SD14, TINY, 323_384_964, 204_952_698_880, Scores(17.12, 30.09, 0.2653)),
    _student("base-2m", SD14, BASE, 579_384_964, 223_800_000_000, Scores(14.81, 34.17, 0.2883), printed=True),
    _student("small-2m", SD14, SMALL, 482_346_884, 217_645_383_680, Scores(17.05, 33.10, 0.2734)),
    _student("tiny-2m", SD14, TINY, 323_384_964, 204_952_698_880, Scores(17.53, 31.32, 0.2690)),
    SD21_BASE,
    SD21,
    _student("v2-base", SD21_BASE, BASE, 583_480_964, 223_987_466_240, Scores(15.85, 31.70, 0.2868)),
    _student("v2-small", SD21_BASE, SMALL, 485_787_524, 217_910_312_960, Scores(16.61, 31.73, 0.2901)),
    _student("v2-tiny", SD21_BASE, TINY, 326_825_604, 205_217_628_160, Scores(15.68, 31.64, 0.2897)),
)

VARIANTS: Mapping[str, Variant] = MappingProxyType({row.name: row for row in _ROWS})


def get(name: str) -> Variant:
    """The row of this name. Raises VariantError, which lists the rows."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise VariantError(f"there is no variant {name!r}: choose from {', '.join(VARIANTS)}") from None
