"""Distillation, top to bottom: a teacher loses blocks, and the student that is left learns to do as it does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from bksdm import block_removal, checkpoint, licence
from bksdm.checkpoint import Checkpoint
from bksdm.sampling import sample
from bksdm.unet import build_unet, unet_config
from bksdm.variants import Variant
from bksdm_training import checkpointing, loop, records, runs
from bksdm_training.charts import save_curve, save_grid
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import DistillConfig
from bksdm_training.denoiser import loss_weights
from bksdm_training.examples import Feed
from bksdm_training.inputs import Inputs, frozen
from bksdm_training.losses import distillation_terms
from bksdm_training.material import Material
from bksdm_training.taps import Tapped, taps


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
    device = accelerator.device
    parts = config.parts(accelerator.num_processes)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    pairs = taps(teacher.unet.config, row.removal)
    student = Tapped(bare.train(), [tap.student for tap in pairs])
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    guide = Tapped(frozen(teacher.unet, device, dtype), [tap.teacher for tap in pairs])
    if config.compiled:
        for unet in (student.unet, guide.unet):
            compile_blocks(unet)
    prepare = Inputs(teacher, device)
    feed = Feed(
        material.examples,
        batch_size=config.loop.batch_size,
        parts=parts,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=config.workers,
        pinned=device.type == "cuda",
    )
    skips = runs.SkipCount(material.lost, config.skip_limit, output / "states")
    snr = config.weights.snr_gamma
    is_velocity = prepare.scheduler.config["prediction_type"] == "v_prediction"
    example_weights = None
    if snr is not None:
        example_weights = loss_weights(prepare.scheduler.alphas_cumprod, snr, velocity=is_velocity).to(device)

    def loss_at(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        batch = feed.batch(step, part)
        skips.add(batch)
        noisy, timesteps, context, target = prepare(batch)
        theirs, their_features = None, ()
        if config.weights.teacher_needed:
            with torch.no_grad():
                theirs, their_features = guide(noisy.to(dtype), timesteps, context.to(dtype))
        ours, our_features = model(noisy, timesteps, context)
        weighted = None if example_weights is None else example_weights[timesteps]
        return distillation_terms(ours, target, our_features, theirs, their_features, config.weights, weighted)

    finish = _Checkpoints(config, teacher, row, material, output, device)
    runs.track(accelerator, f"distill-{row.name}", output / "states")

    def on_checkpoint(step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        finish.write(step, average, staging)
        skips.write(staging)

    loop.run(
        row.name,
        student,
        loss_at,
        replace(config.loop, accumulate=parts),
        output / "states",
        accelerator=accelerator,
        on_checkpoint=on_checkpoint,
        on_saved=finish.show,
        made_on=started,
        on_step=lambda step: skips.check(step, config.loop),
    )
    if accelerator.is_main_process and (skips.taken or not (output / "training.json").is_file()):
        finish.publish(
            taps=[asdict(tap) for tap in pairs],
            skipped=skips.summary(),
            processes=accelerator.num_processes,
            parts=parts,
            mixed_precision=str(accelerator.mixed_precision),
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it ends the processes' group
    return output / "checkpoint"


def _begin(
    config: DistillConfig, teacher: Checkpoint, row: Variant, material: Material, output: Path, accelerator: Accelerator
) -> str:
    """Refuse what does not go with the run in `output`; a hash of what the run is made on."""
    now: dict[str, object] = {
        "variant": row.name,
        "settings": runs.settings(config),
        "data": {**material.about, "identity": material.examples.identity},
        "teacher": runs.digests(teacher),
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


class _Checkpoints:
    """Writes the averaged student as a diffusers checkpoint, with its pictures beside the teacher's."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: Checkpoint,
        row: Variant,
        material: Material,
        output: Path,
        device: torch.device,
    ) -> None:
        self.config, self.teacher, self.row, self.material = config, teacher, row, material
        self.output, self.device = output, device
        self.captions = list(material.captions[: config.shown])
        self.teachers: Tensor | None = None

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The student on the CPU; only the main process comes to need it."""
        return build_unet(unet_config(self.teacher.unet.config, self.row.removal))

    def write(self, step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        """A state's own checkpoint."""
        self._take(average)
        checkpoint.save(self._whole(step), staging / "checkpoint", dtype=torch.float16)

    def show(self, _step: int, average: Mapping[str, Tensor], state: Path) -> None:
        """A state's grid, and the curve so far."""
        rows = loop.read_log(self.output / "states")
        save_curve([loop.summed(row) for row in rows], self.output / "loss.png", title=f"distilling {self.row.name}")
        if self.captions:
            self._take(average)
            self._draw(state / "samples.png")

    def _take(self, average: Mapping[str, Tensor]) -> None:
        self.unet.load_state_dict({key.removeprefix("unet."): value for key, value in average.items()})

    def publish(self, **facts: object) -> None:
        """The newest state's checkpoint and grid as the run's, and training.json with all that repeats it."""
        state = checkpointing.load_newest(self.output / "states")
        if state is None:
            raise ResumeError(f"{self.output / 'states'} is gone: run the command again")
        self._take(state.groups["ema"])
        checkpoint.save(self._whole(state.step), self.output / "checkpoint", dtype=torch.float16)
        if self.captions:
            self._draw(self.output / "samples.png")
        written = {
            "variant": self.row.name,
            "config": asdict(self.config),
            "teacher": self.teacher.source,
            "data": {**self.material.about, "identity": self.material.examples.identity},
            "seconds": round(float(str(state.facts["seconds"]))),
            **facts,
            **records.machine(self.device, "transformers", "accelerate"),
        }
        records.write_json(self.output / "training.json", written)

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

    def _draw(self, path: Path) -> None:
        """Teacher above student, from the same noise."""
        if self.teachers is None:
            self.teachers = self._pictures(self.teacher.unet)
        pictures = torch.cat([self.teachers, self._pictures(self.unet)])
        save_grid(pictures, path, columns=len(self.captions), captions=self.captions * 2)

    def _pictures(self, unet: UNet2DConditionModel) -> Tensor:
        half = self.device.type == "cuda"
        with torch.autocast("cuda", torch.float16) if half else nullcontext():
            return sample(
                frozen(unet, self.device),
                frozen(self.teacher.text_encoder, self.device),
                frozen(self.teacher.vae, self.device),
                self.teacher.tokenizer,
                self.teacher.scheduler_config,
                self.captions,
                guidance=self.teacher.guidance_scale,
                seeds=range(len(self.captions)),
                size=self.config.size,
            )
