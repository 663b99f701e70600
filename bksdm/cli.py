"""bksdm-compress: a teacher becomes a block-removed student, ready to distil or export."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bksdm.errors import CheckpointError, IncompatibleTeacher, VariantError
from bksdm.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from bksdm.block_removal import Block
    from bksdm.checkpoint import Checkpoint

COMMAND = "bksdm-compress"
EXTRA = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub")  # bksdm[torch]
# The 2m rows are the same rules, trained on more pairs.
STUDENTS = tuple(name for name, row in VARIANTS.items() if row.teacher and not name.endswith("-2m"))
TEACHERS = tuple(name for name, row in VARIANTS.items() if not row.teacher)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--variant", type=click.Choice(STUDENTS), required=True, help="What to remove: the student's name.")
@click.option(
    "--teacher",
    metavar="CHECKPOINT",
    help=f"A diffusers folder, a .safetensors file, random, or a model on the Hub: {', '.join(TEACHERS)}. "
    "Default: the variant's own teacher, from the Hub.",
)
@click.option(
    "--teacher-variant",
    type=click.Choice(TEACHERS),
    help="What the teacher is. A single file of Stable Diffusion 2 does not say it: sd-v2.1-base predicts noise, "
    "sd-v2.1 velocity.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the checkpoint that is in the output folder.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Stored weights.")
@click.option("--revision", help="Commit, branch or tag on the Hub.")
@click.option("--allow-pickle", is_flag=True, help="Also read .bin and .ckpt files, as plain tensors only.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --teacher random.")
def main(
    variant: str,
    teacher: str | None,
    teacher_variant: str | None,
    output: Path,
    force: bool,
    dtype: str,
    revision: str | None,
    allow_pickle: bool,
    seed: int,
) -> None:
    """Write the student that block removal leaves of a teacher: a full diffusers checkpoint.

    The student starts from its teacher's weights and still needs distilling. The table of what was kept and removed
    goes to standard output.
    """
    # At its import diffusers reports which of several optimum distributions it picked: nothing for our users.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(format=f"{COMMAND}: %(message)s", stream=sys.stderr)
    try:
        if output.exists() and not force and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output} exists: choose another folder, or pass --force to replace a checkpoint")
        from bksdm import checkpoint, diffusers_folder

        diffusers_folder.refuse_foreign(output)  # before the teacher is loaded and cut
        name, variant_said = _named(VARIANTS[variant], teacher, teacher_variant)
        _say("loading the teacher ...")
        whole = checkpoint.load(name, variant=variant_said, revision=revision, allow_pickle=allow_pickle, seed=seed)
        _compress(VARIANTS[variant], whole, output, dtype)
    except ModuleNotFoundError as reason:
        if reason.name not in EXTRA:
            raise
        _end(2, "needs torch: pip install 'bksdm[torch]'")
    except CheckpointError as reason:
        flag = {"weights": " (--teacher)", "variant": " (--teacher-variant)"}.get(reason.change or "", "")
        _end(1, f"{reason}{flag}")
    except (IncompatibleTeacher, VariantError, OSError) as reason:
        _end(1, str(reason))
    except KeyboardInterrupt:
        _end(130, "stopped")


def _compress(row: Variant, whole: Checkpoint, output: Path, dtype: str) -> None:
    import torch

    from bksdm import block_removal, checkpoint

    name = block_removal.student_name(row, whole.unet.config)
    _say(f"removing blocks as in {row.name} ...")
    blocks = block_removal.blocks(whole.unet.config, row.removal)
    unet = block_removal.compress(whole.unet, row.removal)
    # Paragraph 4 of the OpenRAIL licences: say prominently that the files were changed.
    changed = f"Changed: U-Net blocks were removed, as in {row.name}, from {whole.source}."
    student = replace(
        whole,
        variant=checkpoint.variant_of(unet, claimed=name),
        source=f"{whole.source}, blocks removed as in {row.name}",
        unet=unet,
        licence=replace(whole.licence, notice=f"{changed}\n\n{whole.licence.notice}"),
    )
    lines = report(whole, student, blocks, output)  # before the student is written: whatever fails, fails here
    _say(f"writing {output} ...")
    checkpoint.save(student, output, dtype={"fp32": torch.float32, "fp16": torch.float16}[dtype])
    click.echo("\n".join(lines))


def _named(row: Variant, teacher: str | None, variant: str | None) -> tuple[str | None, str | None]:
    """What bksdm.checkpoint.load calls this teacher: its weights (None for the Hub's) and its variant."""
    if teacher in TEACHERS and not Path(teacher).exists():
        if variant not in (None, teacher):
            raise CheckpointError(f"--teacher {teacher} is another model than --teacher-variant {variant}: name one")
        return None, teacher
    if teacher in (None, "random"):
        return teacher, variant or row.teacher
    return teacher, variant


def report(teacher: Checkpoint, student: Checkpoint, blocks: Iterable[Block], output: Path) -> list[str]:
    """The table of what was kept and removed, one line per part of the teacher's U-Net."""
    from bksdm.components import vae_scale
    from bksdm.unet import count_macs

    parts: dict[str, list[Block]] = {}
    for block in sorted(blocks, key=_place):
        parts.setdefault(_part(block.name), []).append(block)
    rows = [("U-Net", "blocks", "becomes", "teacher", "student", "kept")]
    for name, inside in parts.items():
        kept = [block for block in inside if block.student]
        rows.append(
            (
                name,
                "" if name == "in, out, time" else " ".join(_letter(block) for block in inside),
                _part(kept[0].student or "") if kept else "removed",
                *_figures(sum(block.params for block in inside), sum(block.params for block in kept)),
            )
        )
    total = _params(teacher), _params(student)
    unet = _unet_params(teacher), _unet_params(student)
    latent = student.image_size // vae_scale(student.vae)
    macs = count_macs(teacher.unet.config, latent=latent), count_macs(student.unet.config, latent=latent)
    prefix, unit = ("G", 1e9) if macs[1] > 1e9 else ("M", 1e6)
    rows += [
        ("", "", "", "", "", ""),
        ("U-Net parameters", "", "", *_figures(*unet)),
        (f"U-Net {prefix}MACs at {student.image_size} px", "", "", *_figures(*macs, unit=unit)),
        ("all parameters, with text encoder and VAE", "", "", *_figures(*total)),
    ]
    return [
        f"teacher  {teacher.source} ({teacher.variant})",
        f"student  {output} ({student.variant})",
        "",
        *_aligned(rows),
        "",
        "R residual, A attention, D and U down- and upsampler, - removed. MACs: of convolutions and linear layers.",
    ]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    # The labels of the totals may run into the two columns that they leave empty.
    first = max(len(row[0]) for row in rows if row[1] or row[2])
    second, third = (max(len(row[column]) for row in rows) for column in (1, 2))
    numbers = [max(len(row[column]) for row in rows) for column in (3, 4, 5)]
    lines = []
    for row in rows:
        left = f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]:<{third}}"
        if not row[1] and not row[2]:
            left = f"{row[0]:<{first + second + third + 4}}"
        right = (f"{text:>{width}}" for text, width in zip(row[3:], numbers, strict=True))
        lines.append("  ".join((left, *right)).rstrip())
    return lines


def _figures(teacher: int, student: int, *, unit: float = 1) -> tuple[str, str, str]:
    shown = (f"{count:,}" if unit == 1 else f"{count / unit:,.1f}" for count in (teacher, student))
    before, after = shown
    return before, after, f"{100 * student / teacher:.0f} %"


def _part(name: str) -> str:
    words = name.split(".")
    if words[0] in ("down_blocks", "up_blocks"):
        return f"{words[0].removesuffix('_blocks')} {words[1]}"
    return "mid" if words[0] == "mid_block" else "in, out, time"


def _place(block: Block) -> tuple[int, int, int, int]:
    """The order in which data passes: down, mid, up; in a stage, each layer's residual before its attention."""
    words = block.name.split(".")
    side = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3}.get(words[0], 0)
    if not side:
        return (0, 0, 0, 0)
    stage = int(words[1]) if side != 2 else 0
    kind, number = words[-2], int(words[-1])
    if kind.endswith("samplers"):
        return (side, stage, 1000, 0)
    return (side, stage, number, 0 if kind == "resnets" else 1)


def _letter(block: Block) -> str:
    if not block.student:
        return "-"
    kind = block.name.split(".")[-2]
    return {"resnets": "R", "attentions": "A", "downsamplers": "D", "upsamplers": "U"}[kind]


def _unet_params(whole: Checkpoint) -> int:
    return sum(parameter.numel() for parameter in whole.unet.parameters())


def _params(whole: Checkpoint) -> int:
    return sum(
        parameter.numel() for model in (whole.text_encoder, whole.unet, whole.vae) for parameter in model.parameters()
    )


def _say(text: str) -> None:
    click.echo(text, err=True)


def _end(code: int, text: str) -> None:
    click.echo(f"{COMMAND}: {text}", err=True)
    sys.exit(code)
