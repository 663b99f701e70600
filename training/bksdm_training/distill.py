"""Distillation, top to bottom: a teacher loses blocks, and the student that is left learns to do as it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from bksdm import block_removal, checkpoint, digests, licence
from bksdm.checkpoint import Checkpoint
from bksdm.unet import build_unet, unet_config
from bksdm.variants import Variant
from bksdm_training import fit, records, runs
from bksdm_training.charts import save_grid
from bksdm_training.checkpointing import State
from bksdm_training.config import DistillConfig
from bksdm_training.denoiser import loss_weights
from bksdm_training.examples import Batch
from bksdm_training.inputs import Inputs, draw, frozen, placed
from bksdm_training.losses import distillation_terms
from bksdm_training.material import Material
from bksdm_training.taps import Tap, Tapped, taps


def distill(
    config: DistillConfig, teacher: Checkpoint, row: Variant, material: Material, output: Path, accelerator: Accelerator
) -> Path:
    """Distil the student that `row`'s rule leaves of `teacher`; returns the folder of its diffusers checkpoint.

    Goes on from what `output` holds of an earlier run with the same settings, data and teacher. Every state there holds
    a checkpoint/ of its own. Under `accelerate launch` every process calls this.
    Raises IncompatibleTeacher, ResumeError (anything else), DataError (too much of the data is unusable),
    DivergedError."""
    block_removal.student_name(row, teacher.unet.config)
    bare = _student(config, teacher, row)  # what does not fit is refused before anything is written
    started = _begin(config, teacher, row, material, output, accelerator)
    device, dtype = accelerator.device, fit.network_dtype(accelerator)
    pairs = taps(teacher.unet.config, row.removal)
    student = Tapped(bare.train(), [tap.student for tap in pairs])
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    guide = Tapped(frozen(teacher.unet, device, dtype), [tap.teacher for tap in pairs])
    if config.compiled:
        compile_blocks(guide.unet)
        # A compiled block that is run again for its gradient may be another compilation than the one that ran first,
        # which keeps other tensors: torch refuses it (seen on an H100, torch 2.11, fp16).
        if not config.gradient_checkpointing:
            compile_blocks(student.unet)
    prepare = Inputs(teacher, device)
    example_weights = None
    if config.weights.snr_gamma is not None:
        is_velocity = prepare.scheduler.config["prediction_type"] == "v_prediction"
        alphas = prepare.scheduler.alphas_cumprod
        example_weights = loss_weights(alphas, config.weights.snr_gamma, velocity=is_velocity).to(device)

    def loss_of(model: nn.Module, batch: Batch, _positions: range) -> dict[str, Tensor]:
        noisy, timesteps, context, target = prepare(batch)
        theirs, their_features = None, ()
        if config.weights.teacher_needed:
            with torch.no_grad():
                theirs, their_features = guide(noisy.to(dtype), timesteps, context.to(dtype))
        ours, our_features = model(noisy, timesteps, context)
        weighted = None if example_weights is None else example_weights[timesteps]
        return distillation_terms(ours, target, our_features, theirs, their_features, config.weights, weighted)

    product = _Student(config, teacher, row, material, output, device, pairs)
    fit.fit(row.name, student, loss_of, product, config, material, output, accelerator, made_on=started)
    return output / "checkpoint"


def _begin(
    config: DistillConfig, teacher: Checkpoint, row: Variant, material: Material, output: Path, accelerator: Accelerator
) -> str:
    """Refuse what does not go with the run in `output`; a hash of what the run is made on."""
    now: dict[str, object] = {
        "variant": row.name,
        "settings": runs.settings(config),
        "data": fit.described(material),
        "teacher": digests.of_parts(teacher),
        "precision": str(accelerator.mixed_precision),
    }
    said = {
        "variant": "--variant",
        "settings": "settings",
        "data": "data",
        "teacher": "teacher",
        "precision": "--mixed-precision",
    }
    runs.begin(output, now, said, accelerator)
    return runs.made_on(now["data"], now["teacher"])


def _student(config: DistillConfig, teacher: Checkpoint, row: Variant) -> UNet2DConditionModel:
    if config.start == "teacher":
        return block_removal.compress(teacher.unet, row.removal)
    torch.manual_seed(config.loop.seed)
    return build_unet(unet_config(teacher.unet.config, row.removal))


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """torch.compile of every transformer and residual block in place: they are alike, so few compilations serve all.

    The modules between stay as they are, the tapped ones among them."""
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile()


class _Student:
    """The averaged student as a diffusers checkpoint, with its pictures beside the teacher's: a fit.Product."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: Checkpoint,
        row: Variant,
        material: Material,
        output: Path,
        device: torch.device,
        pairs: Sequence[Tap],
    ) -> None:
        self.config, self.teacher, self.row, self.material = config, teacher, row, material
        self.output, self.device, self.pairs = output, device, pairs
        self.captions = list(material.captions[: config.shown])

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The student on the CPU; only the main process comes to need it."""
        return build_unet(unet_config(self.teacher.unet.config, self.row.removal))

    @cached_property
    def teachers(self) -> Tensor:
        """The teacher's pictures, drawn once."""
        return self._pictures(self.teacher)

    def write(self, step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        self._take(average)
        checkpoint.save(self._whole(step), staging / "checkpoint", dtype=torch.float16)

    def show(self, step: int, average: Mapping[str, Tensor], folder: Path) -> None:
        """Teacher above student, from the same noise."""
        if self.captions:
            self._take(average)
            pictures = torch.cat([self.teachers, self._pictures(replace(self.teacher, unet=self.unet))])
            save_grid(pictures, folder / "samples.png", columns=len(self.captions), captions=self.captions * 2)

    def publish(self, state: State, folder: Path) -> dict[str, object]:
        self._take(state.groups["ema"])
        checkpoint.save(self._whole(state.step), self.output / "checkpoint", dtype=torch.float16)
        if not (folder / "samples.png").is_file():  # killed before it was drawn
            self.show(state.step, state.groups["ema"], folder)
        records.copy_whole(folder / "samples.png", self.output)
        return {
            "variant": self.row.name,
            "teacher": self.teacher.source,
            "taps": [asdict(pair) for pair in self.pairs],
        }

    def _take(self, average: Mapping[str, Tensor]) -> None:
        self.unet.load_state_dict({key.removeprefix("unet."): value for key, value in average.items()})

    def _pictures(self, whole: Checkpoint) -> Tensor:
        seeds = range(len(self.captions))
        return draw(placed(whole, self.device), self.captions, self.config.size, seeds=seeds)

    def _whole(self, step: int) -> Checkpoint:
        changed = (
            f"Changed: U-Net blocks were removed, as in {self.row.name}, from {self.teacher.source}, and what was left "
            f"was trained for {step} steps."
        )
        terms = self.teacher.licence
        if self.material.terms is not None:
            terms = licence.joined(terms, self.material.terms)
        claimed = block_removal.student_name(self.row, self.teacher.unet.config)
        return replace(
            self.teacher,
            unet=self.unet,
            variant=checkpoint.variant_of(self.unet, claimed=claimed),
            source=f"{self.teacher.source}, distilled as {self.row.name}",
            licence=replace(terms, notice=f"{changed}\n\n{terms.notice}"),
        )
