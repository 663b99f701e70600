"""bksdm-compress, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bksdm import checkpoint
from bksdm.block_removal import compress
from bksdm.checkpoint import Checkpoint
from bksdm.cli import main
from bksdm.variants import SMALL, TINY

TEACHER = Path(__file__).parents[2] / "checkpoints" / "demo-teacher"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_writes_the_block_removed_student_and_its_table(
    mini_folder: Path, mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = run("--teacher", mini_folder, "--variant", "tiny", "-o", tmp_path / "tiny")
    assert result.exit_code == 0, result.output
    student = checkpoint.load(str(tmp_path / "tiny"))
    expected = compress(mini_checkpoint.unet, TINY).state_dict()
    assert student.unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(student.unet.state_dict()[key], tensor) for key, tensor in expected.items())
    assert student.vae.decoder.conv_in.weight.equal(mini_checkpoint.vae.decoder.conv_in.weight)
    table = result.stdout
    assert "up 1           R A - - R A U  up 0" in table
    assert "down 2         R A - - -      down 2" in table
    assert "down 3         - -            removed" in table
    assert f"{sum(tensor.numel() for tensor in expected.values()):,}" in table
    assert "loading the teacher ..." in result.stderr
    assert "..." not in table
    assert max(len(line) for line in table.splitlines() if "/" not in line) <= 110


def test_the_figures_of_the_table_add_up(mini_folder: Path, mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    lines = run("--teacher", mini_folder, "--variant", "small", "-o", tmp_path / "s").stdout.splitlines()
    start, end = next(i for i, line in enumerate(lines) if line.startswith("U-Net  ")), lines.index("", 4)
    rows = [line.split() for line in lines[start + 1 : end]]
    teacher, student = (sum(int(row[column].replace(",", "")) for row in rows) for column in (-4, -3))
    assert teacher == sum(parameter.numel() for parameter in mini_checkpoint.unet.parameters())
    assert student == sum(p.numel() for p in compress(mini_checkpoint.unet, SMALL).parameters())


def test_a_teacher_whose_sample_size_is_a_pair_is_reported(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": [8, 8]}))
    result = run("--teacher", copy, "--variant", "base", "-o", tmp_path / "base")
    assert result.exit_code == 0, result.output
    assert "MACs at 64 px" in result.stdout


def test_what_fails_in_the_report_leaves_nothing_written(
    mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bksdm.cli.report", interrupted)
    assert run("--teacher", mini_folder, "--variant", "base", "-o", tmp_path / "out").exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_half_precision_on_request(mini_folder: Path, tmp_path: Path) -> None:
    run("--teacher", mini_folder, "--variant", "base", "-o", tmp_path / "h", "--dtype", "fp16")
    tensors = load_file(tmp_path / "h" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_the_licence_goes_on_and_says_that_files_were_changed(copy: Path, tmp_path: Path) -> None:
    from bksdm.licence import published

    (copy / "bksdm.json").unlink()
    (copy / "LICENSE").write_text(published("CreativeML OpenRAIL-M").notice)
    run("--teacher", copy, "--variant", "base", "-o", tmp_path / "s")
    terms = checkpoint.load(str(tmp_path / "s")).licence
    assert terms.name == "CreativeML OpenRAIL-M"
    assert terms.notice.startswith("Changed: U-Net blocks were removed, as in base, from ")
    assert terms.notice.endswith(published("CreativeML OpenRAIL-M").notice)


def test_an_existing_output_is_kept_unless_forced(mini_folder: Path, copy: Path, tmp_path: Path) -> None:
    arguments = ("--teacher", mini_folder, "--variant", "base", "-o", copy)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "exists: choose another folder, or pass --force" in result.stderr
    assert checkpoint.load(str(copy)).unet.config["layers_per_block"] == 2
    assert run(*arguments, "--force").exit_code == 0
    assert checkpoint.load(str(copy)).unet.config["layers_per_block"] == 1
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "work.tex").write_text("x")
    result = run("--teacher", mini_folder, "--variant", "base", "-o", tmp_path / "thesis", "--force")
    assert (result.exit_code, (tmp_path / "thesis" / "work.tex").exists()) == (1, True)
    assert "holds something that is not a checkpoint" in result.stderr
    assert "loading" not in result.stderr  # refused before the teacher is loaded and cut


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--teacher", "lost", "--variant", "tiny", "-o", "out"), 1, "there is no lost: give other weights: a "),
        (("--teacher", "lost", "--variant", "tiny", "-o", "out"), 1, "no download) (--teacher)"),
        (("--teacher", "sd-v2.1", "--teacher-variant", "sd-v1.4", "--variant", "tiny", "-o", "out"), 1, "name one"),
        (("--teacher-variant", "sd-v2.1", "--variant", "v2-tiny", "-o", "out"), 1, "ai/stable-diffusion-2-1 is not"),
        (("--variant", "tiny", "-o", "out"), 1, "CompVis/stable-diffusion-v1-4 is not in the cache"),
        (("--variant", "v2-tiny", "-o", "out"), 1, "ai/stable-diffusion-2-1-base is not in the cache"),
        (("--teacher", "sd-v2.1", "--variant", "v2-tiny", "-o", "out"), 1, "ai/stable-diffusion-2-1 is not in the"),
        (("--variant", "huge", "-o", "out"), 2, "'huge' is not one of"),
        (("--variant", "tiny"), 2, "Missing option '-o'"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    if code == 1:
        assert result.stderr.splitlines()[-1].startswith("bksdm-compress: ")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "is damaged or cut short"),
        (
            lambda file: save_file(load_file(file) | {"conv_in.bias": torch.full((32,), torch.nan)}, file),
            "holds 32 NaN",
        ),
        (lambda file: torch.save(load_file(file), file.with_suffix(".bin")) or file.unlink(), "is a pickle, which can"),
    ],
    ids=["truncated", "NaN", "pickle"],
)
def test_damaged_weights_end_in_one_sentence(
    copy: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(copy / "unet" / "diffusion_pytorch_model.safetensors")
    result = run("--teacher", copy, "--variant", "tiny", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()
    assert last[0] == "loading the teacher ..."
    assert len(last) == 2
    assert last[1].startswith("bksdm-compress: ")
    assert message in last[1]
    assert not (tmp_path / "out").exists()


def test_the_demos_teacher_is_compressed_and_its_student_opens_in_diffusers_pipeline(tmp_path: Path) -> None:
    result = run("--teacher", TEACHER, "--variant", "small", "-o", tmp_path / "student")
    assert result.exit_code == 0, result.output
    demo = checkpoint.load(str(TEACHER))
    student = checkpoint.load(str(tmp_path / "student"))
    assert (student.guidance_scale, student.licence.name) == (demo.guidance_scale, demo.licence.name)
    assert student.licence.notice.endswith(demo.licence.notice)
    expected = compress(demo.unet, SMALL).state_dict()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    found = pipeline.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    pipeline.set_progress_bar_config(disable=True)
    size = demo.image_size
    pixels = pipeline("a red apple", num_inference_steps=2, height=size, width=size, output_type="np").images
    assert pixels.shape == (1, size, size, 3)
    assert pixels.std() > 0


def test_a_student_is_refused_as_a_teacher_and_an_sd1_teacher_for_v2(
    mini_folder: Path, mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    run("--teacher", mini_folder, "--variant", "small", "-o", tmp_path / "small")
    result = run("--teacher", tmp_path / "small", "--variant", "tiny", "-o", tmp_path / "again")
    assert result.exit_code == 1
    assert "layers_per_block 1: it is a student already" in result.stderr
    result = run("--teacher", mini_folder, "--variant", "v2-tiny", "-o", tmp_path / "v2")
    assert result.exit_code == 1
    assert "v2-tiny is cut from a Stable Diffusion 2 teacher" in result.stderr
    assert "use --variant tiny" in result.stderr


def test_v2_teachers_of_another_width_are_cut_too(build_mini: Callable[..., Checkpoint], tmp_path: Path) -> None:
    changes = {"attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True}
    checkpoint.save(build_mini(unet=changes), tmp_path / "v2")
    for variant in ("v2-tiny", "tiny"):
        result = run("--teacher", tmp_path / "v2", "--variant", variant, "-o", tmp_path / variant)
        assert result.exit_code == 0, result.output
        assert list(checkpoint.load(str(tmp_path / variant)).unet.config["attention_head_dim"]) == [2, 4, 8]


def test_ctrl_c_ends_cleanly(mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bksdm.diffusers_folder.save_file", interrupted)
    result = run("--teacher", mini_folder, "--variant", "base", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "accelerate", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Hide())
from bksdm.cli import main
main(sys.argv[1:])
"""


def test_help_works_without_torch_and_a_run_names_the_extra(tmp_path: Path) -> None:
    def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)

    done = without_torch("--help")
    assert done.returncode == 0
    assert "--teacher" in done.stdout
    done = without_torch("--variant", "tiny", "-o", str(tmp_path / "out"), "--teacher", "random")
    assert done.returncode == 2
    assert done.stderr == "bksdm-compress: needs torch: pip install 'bksdm[torch]'\n"


@pytest.mark.slow
def test_full_size_sd14_becomes_tiny_with_every_key_present(tmp_path: Path) -> None:
    result = run("--teacher", "random", "--variant", "tiny", "-o", tmp_path / "tiny", "--dtype", "fp16")
    assert result.exit_code == 0, result.output
    student = checkpoint.load(str(tmp_path / "tiny"), variant="tiny")
    assert sum(parameter.numel() for parameter in student.unet.parameters()) == 323_384_964
    assert student.licence.name == "none (random weights)"
    assert "859,520,964" in result.stdout
    assert "323,384,964" in result.stdout
    teacher = checkpoint.load("random", variant="sd-v1.4").unet.state_dict()
    ours = student.unet.state_dict()
    for key, place in (
        ("up_blocks.0.resnets.1.conv1.weight", "up_blocks.1.resnets.2.conv1.weight"),
        ("up_blocks.2.attentions.1.proj_in.weight", "up_blocks.3.attentions.2.proj_in.weight"),
        ("down_blocks.2.resnets.0.conv2.bias", "down_blocks.2.resnets.0.conv2.bias"),
    ):
        assert torch.equal(ours[key], teacher[place].half().float()), key
