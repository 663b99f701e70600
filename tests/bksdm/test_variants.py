"""The table against the paper's figures, and against the U-Nets that its rules build."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from bksdm import unet, variants
from bksdm.licence import published
from bksdm.variants import VARIANTS, VariantError

# Typed out from the paper and the model cards, independently of the table: parameters (exact), GMACs, scores.
PUBLISHED = {
    "sd-v1.4": (859_520_964, 338.7, (13.05, 36.76, 0.2958)),
    "base": (579_384_964, 223.8, (15.76, 33.79, 0.2878)),
    "small": (482_346_884, 217.7, (16.98, 31.68, 0.2677)),
    "tiny": (323_384_964, 205.0, (17.12, 30.09, 0.2653)),
    "base-2m": (579_384_964, 223.8, (14.81, 34.17, 0.2883)),
    "small-2m": (482_346_884, 217.7, (17.05, 33.10, 0.2734)),
    "tiny-2m": (323_384_964, 205.0, (17.53, 31.32, 0.2690)),
    "sd-v2.1-base": (None, None, (13.93, 35.93, 0.3075)),
    "v2-base": (None, None, (15.85, 31.70, 0.2868)),
    "v2-small": (None, None, (16.61, 31.73, 0.2901)),
    "v2-tiny": (None, None, (15.68, 31.64, 0.2897)),
    "sd-v2.1": (None, None, None),
}
# The v2 table of MODEL_CARD.md (github.com/Nota-NetsPresso/BK-SDM), which rounds up: billions, U-Net and whole model.
PRINTED = {
    "sd-v2.1-base": (0.87, 1.26),
    "v2-base": (0.59, 0.98),
    "v2-small": (0.49, 0.88),
    "v2-tiny": (0.33, 0.72),
    "sd-v1.4": (0.86, 1.04),
    "base": (0.58, 0.76),
    "small": (0.49, 0.66),
    "tiny": (0.33, 0.50),
}
# Text encoder (CLIP ViT-L, OpenCLIP ViT-H but its last layer) and VAE decoder, as test_random_weights counts them.
OTHERS = {"v1": 123_060_480 + 49_490_199, "v2": 340_387_840 + 49_490_199}


def test_every_variant_and_every_teacher_is_a_row() -> None:
    assert set(VARIANTS) == set(PUBLISHED)
    assert all(row.teacher in VARIANTS for row in VARIANTS.values() if row.teacher is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_the_published_ones(name: str) -> None:
    scores = VARIANTS[name].scores
    found = None if scores is None else (scores.fid, scores.is_, scores.clip)
    assert found == PUBLISHED[name][2]


@pytest.mark.parametrize("name", VARIANTS)
def test_built_unet_has_exactly_the_rows_parameters(name: str) -> None:
    row = VARIANTS[name]
    built = unet.count_params(unet.unet_config(row.architecture.unet, row.removal))
    assert built == row.unet_params
    if PUBLISHED[name][0] is not None:
        assert built == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PRINTED)
def test_parameters_are_the_printed_ones_also_where_the_last_digits_are_counted(name: str) -> None:
    row = VARIANTS[name]
    found = row.unet_params, row.unet_params + OTHERS[row.family]
    assert tuple(math.ceil(count / 1e7) / 100 for count in found) == PRINTED[name]


def test_sd21s_unet_has_the_parameters_that_its_authors_training_code_prints() -> None:
    # "DiffusionWrapper has 865.91 M params.", github.com/Stability-AI/stablediffusion at each start
    assert f"{VARIANTS['sd-v2.1'].unet_params * 1e-6:.2f}" == "865.91"


def test_every_row_names_the_source_of_its_figures() -> None:
    for row in VARIANTS.values():
        printed = row.scores is not None or set(row.counted) != {"unet_params", "macs"}
        assert ("arXiv 2305.15798" in row.source) is printed, row.name
    assert VARIANTS["sd-v2.1"].source == "counted"


@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_within_a_thousandth_of_the_row(name: str) -> None:
    row = VARIANTS[name]
    counted = unet.count_macs(unet.unet_config(row.architecture.unet, row.removal))
    # Measured: 0.06 % (base) and 0.03 % (sd-v1.4) from the printed figures, 0 from the counted ones.
    assert counted == pytest.approx(row.macs, rel=1e-3)
    if "macs" in row.counted:
        assert counted == row.macs
    if PUBLISHED[name][1] is not None:
        assert counted == pytest.approx(PUBLISHED[name][1] * 1e9, rel=1e-3)


def test_figures_that_the_authors_did_not_print_are_marked() -> None:
    assert VARIANTS["base"].counted == ()
    for name in ("small", "tiny", "v2-base", "v2-small", "v2-tiny", "sd-v2.1"):
        assert set(VARIANTS[name].counted) == {"unet_params", "macs"}


def test_hub_names_are_the_published_ones() -> None:
    assert VARIANTS["sd-v1.4"].hub == "CompVis/stable-diffusion-v1-4"
    assert VARIANTS["small"].hub == "nota-ai/bk-sdm-small"
    assert VARIANTS["tiny-2m"].hub == "nota-ai/bk-sdm-tiny-2m"
    assert VARIANTS["v2-base"].hub == "nota-ai/bk-sdm-v2-base"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_rows_licence_comes_with_its_whole_text(name: str) -> None:
    licence = published(VARIANTS[name].licence)
    assert "OpenRAIL" in licence.name
    # Paragraph 4: the use restrictions must be handed on with the weights.
    assert "Attachment A" in licence.notice
    assert "You agree not to use the Model or Derivatives of the Model:" in licence.notice


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(VariantError, match=r"no variant 'smal'.*base, small, tiny.*v2-tiny"):
        variants.get("smal")


def test_the_table_reads_without_torch() -> None:
    code = "import sys, bksdm.variants; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
