"""The licence that weights came with goes on with them, and is called by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bksdm import checkpoint, licence
from bksdm.checkpoint import Licence
from bksdm.cli import main
from bksdm.licence import OPENRAIL_M, OPENRAIL_PLUS_PLUS_M, UNNAMED, joined, published


def own_terms(folder: Path) -> None:
    (folder / "LICENSE").write_text("My Terms 1.0\n\nDo good.\n")
    (folder / "bksdm.json").unlink()


def test_the_licence_file_travels(copy: Path, tmp_path: Path) -> None:
    (copy / "bksdm.json").unlink()
    (copy / "LICENSE").write_text("Apache License\nVersion 2.0\n")
    loaded = checkpoint.load(str(copy))
    assert loaded.licence == Licence("Apache License", "Apache License\nVersion 2.0\n")
    checkpoint.save(loaded, tmp_path / "again")
    assert checkpoint.load(str(tmp_path / "again")).licence == loaded.licence


def test_openrail_text_is_called_by_its_name_and_no_licence_is_called_unknown(copy: Path) -> None:
    (copy / "bksdm.json").unlink()
    for name in (OPENRAIL_M, OPENRAIL_PLUS_PLUS_M):
        (copy / "LICENSE").write_text(published(name).notice)
        assert checkpoint.load(str(copy)).licence.name == name
    (copy / "LICENSE").unlink()
    terms = checkpoint.load(str(copy)).licence
    assert terms.name == "unknown"
    assert str(copy.parent) not in terms.notice  # a path of this machine


@pytest.mark.parametrize(
    ("front", "name", "text"),
    [
        ("license: creativeml-openrail-m", OPENRAIL_M, published(OPENRAIL_M).notice),
        ("tags:\n- x\nlicense: 'openrail++'", OPENRAIL_PLUS_PLUS_M, published(OPENRAIL_PLUS_PLUS_M).notice),
        ("license: other\nlicense_name: my-terms", "my-terms", "names their licence: my-terms\n"),
        ("license: mit  # as the code", "mit", "names their licence: mit\n"),
        ("tags: [license]", "unknown", "Ask their author before passing on.\n"),
    ],
)
def test_a_model_card_names_the_licence_where_no_file_does(copy: Path, front: str, name: str, text: str) -> None:
    (copy / "LICENSE").unlink()
    (copy / "README.md").write_text(f"---\n{front}\n---\n# A model\n\nlicense: none of this\n")
    terms = checkpoint.load(str(copy)).licence
    assert terms.name == name
    assert terms.notice.endswith(text)


@pytest.mark.usefixtures("mini_is_small")
def test_weights_said_to_be_a_published_model_carry_its_licence(copy: Path) -> None:
    (copy / "LICENSE").unlink()
    terms = checkpoint.load(str(copy), variant="small").licence
    assert terms.name == OPENRAIL_M
    assert terms.notice.startswith("No licence file came with these weights (copy); they are said to be small")
    assert terms.notice.endswith(published(OPENRAIL_M).notice)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("CreativeML Open RAIL-M", OPENRAIL_M),
        ("creativeml-openrail-m", OPENRAIL_M),
        ("CreativeML Open RAIL++-M License", OPENRAIL_PLUS_PLUS_M),
        ("CreativeML Open RAIL++-M License dated July 26, 2023", None),  # SDXL's, another text
    ],
)
def test_only_the_two_known_texts_are_recognised(spelling: str, name: str | None) -> None:
    terms = licence.of_header({"modelspec.license": spelling}, "x")
    assert terms.name == (name or spelling)
    assert ("Attachment A" in terms.notice) is (name is not None)


# A trained U-Net laid over a base.


@pytest.mark.parametrize("layout", ["unet", "."])
def test_licence_of_a_trained_unet_joins_the_bases(mini_folder: Path, copy: Path, layout: str) -> None:
    own_terms(copy)
    loaded = checkpoint.load(str(mini_folder), unet=str(copy / layout))
    assert loaded.licence.name == "none (random weights); U-Net: My Terms 1.0"
    assert "nothing was trained" in loaded.licence.notice
    assert loaded.licence.notice.endswith("The U-Net:\n\nMy Terms 1.0\n\nDo good.\n")


def test_a_licence_beside_a_bare_unet_is_its_own_and_one_above_another_project_is_not(
    mini_folder: Path, copy: Path
) -> None:
    own_terms(copy)
    (copy / "model_index.json").unlink()  # not a checkpoint any more: the licence there may be of anything
    assert checkpoint.load(str(mini_folder), unet=str(copy / "unet")).licence.name == "none (random weights)"
    (copy / "LICENSE").rename(copy / "unet" / "LICENSE")
    assert checkpoint.load(str(mini_folder), unet=str(copy / "unet")).licence.name.endswith("U-Net: My Terms 1.0")


def test_a_folder_laid_over_itself_keeps_its_licence(copy: Path) -> None:
    (copy / "LICENSE").write_text("Emoji notices\n")
    assert checkpoint.load(str(copy), unet=str(copy)).licence == checkpoint.load(str(copy)).licence


def test_a_compressed_student_over_its_base_keeps_the_licences_name(mini_folder: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", str(mini_folder), "--variant", "tiny", "-o", str(tmp_path / "student")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    terms = checkpoint.load(str(mini_folder), unet=str(tmp_path / "student")).licence
    assert terms.name == "none (random weights)"
    assert "The U-Net:\n\nChanged: U-Net blocks were removed, as in tiny, from checkpoint." in terms.notice


def test_what_travels_names_no_folder_of_this_machine(mini_folder: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", str(mini_folder), "--variant", "tiny", "-o", str(tmp_path / "student")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    written = [(tmp_path / "student" / name).read_text() for name in ("bksdm.json", "LICENSE")]
    assert not any(str(mini_folder.parent) in text for text in written)
    assert '"source": "checkpoint, blocks removed as in tiny"' in written[0]


# Two licences that apply to the same weights.


def test_joined_licences_keep_every_name_once_and_both_texts() -> None:
    made = joined(Licence("MIT", "Ours.\n"), Licence("Apache-2.0 and MIT", "Theirs.\n"))
    assert made.name == "MIT and Apache-2.0"
    assert made.notice.startswith("Ours.")
    assert made.notice.endswith("Theirs.\n")


def test_a_text_that_holds_the_other_stands_alone() -> None:
    long, short = Licence("MIT", "One.\n\nTwo.\n"), Licence("MIT", "Two.\n")
    assert joined(long, short) == joined(short, long) == long


def test_a_text_without_a_name_goes_by_that_of_the_one_that_holds_it() -> None:
    named, bare = Licence("MIT", "Changed.\n\nTwo.\n"), Licence(UNNAMED, "Two.\n")
    assert joined(named, bare) == joined(bare, named) == named
    assert joined(named, Licence(UNNAMED, "Three.\n")).name == f"MIT and {UNNAMED}"
