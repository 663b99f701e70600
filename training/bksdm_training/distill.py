"""Distillation, top to bottom: a teacher loses blocks, and the student that is left learns to do as it does."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import IntTensor, Tensor, nn

from bksdm import block_removal, checkpoint, licence
from bksdm.checkpoint import Checkpoint
from bksdm.sampling import sample
from bksdm.unet import build_unet, unet_config
from bksdm.variants import Variant
from bksdm_training import checkpointing, loop, records
from bksdm_training.charts import save_curve, save_grid
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import DistillConfig
from bksdm_training.denoiser import loss_weights
from bksdm_training.examples import Batch, Feed
from bksdm_training.losses import distillation_terms
from bksdm_training.material import Material
from bksdm_training.sources import Skips
from bksdm_training.taps import Tapped, taps
from bksdm_training.vae import encode_pixels

logger = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)
# What may change between two calls that go on with one run: speed and memory, not what is learnt.
FREE = ("micro_batch", "gradient_checkpointing", "compiled", "workers", "skip_limit", "shown")
FREE_OF_LOOP = ("steps", "checkpoint_every", "keep", "accumulate", "fused")
CHECK_SKIPS_EVERY = 20  # steps
TELL_SKIPS = 20  # of a process, one by one; the rest are counted


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
    guide = Tapped(_frozen(teacher.unet, device, dtype), [tap.teacher for tap in pairs])
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
    )
    skips = _SkipCount(material.lost, config.skip_limit)
    snr = config.weights.snr_gamma
    example_weights = None if snr is None else loss_weights(prepare.scheduler.alphas_cumprod, snr).to(device)

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
    accelerator.init_trackers(f"distill-{row.name}")
    loop.run(
        row.name,
        student,
        loss_at,
        replace(config.loop, accumulate=parts),
        output / "states",
        accelerator=accelerator,
        on_checkpoint=finish.write,
        made_on=started,
        on_step=skips.check,
    )
    skips.gather()
    if accelerator.is_main_process:
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
    """Refuse what does not go with the run in `output`, in every process alike; a hash of what the run is made on."""
    said: list[str | None] = [None]
    settings = asdict(config)
    for key in FREE:
        del settings[key]
    for key in FREE_OF_LOOP:
        del settings["loop"][key]
    parts = {"text_encoder": teacher.text_encoder, "unet": teacher.unet, "vae": teacher.vae}
    now: dict[str, object] = {
        "variant": row.name,
        "settings": settings,
        "data": {**material.about, "identity": material.examples.identity},
        "teacher": {name: checkpointing.digest(part.state_dict()) for name, part in parts.items()},
    }
    if accelerator.is_main_process:
        try:
            records.same_run(
                output, now, {"variant": "--variant", "settings": "settings", "data": "data", "teacher": "teacher"}
            )
        except (ResumeError, OSError) as error:
            said = [str(error)]
    broadcast_object_list(said)
    if said[0] is not None:
        raise ResumeError(said[0])
    return hashlib.sha256(json.dumps([now["data"], now["teacher"]], sort_keys=True).encode()).hexdigest()


def _student(config: DistillConfig, teacher: Checkpoint, row: Variant) -> UNet2DConditionModel:
    if config.start == "teacher":
        return block_removal.compress(teacher.unet, row.removal)
    torch.manual_seed(config.loop.seed)
    return build_unet(unet_config(teacher.unet.config, row.removal))


def _frozen(module: Module, device: torch.device, dtype: torch.dtype = torch.float32) -> Module:
    """The module where it is used; itself on a CPU, elsewhere a copy: the original is still saved and drawn with."""
    placed = module if device.type == "cpu" and dtype == torch.float32 else copy.deepcopy(module)
    # nn.Module's own: diffusers' warns of nothing that happens here
    return cast(Module, nn.Module.to(placed, device=device, dtype=dtype).eval().requires_grad_(False))


class Inputs:
    """From a batch to what the U-Nets are given, with the teacher's frozen encoders, in float32 and without gradients.

    Called with a Batch; returns noisy latents [B, 4, h, w], timesteps [B], context [B, 77, D] and the target [B, 4, h,
    w]: the noise, or the velocity where the teacher predicts that."""

    def __init__(self, teacher: Checkpoint, device: torch.device) -> None:
        self.device, self.teacher = device, teacher
        self.encoders: tuple[AutoencoderKL, Any] | None = None
        self.scheduler = cast(DDPMScheduler, DDPMScheduler.from_config(teacher.scheduler_config))
        self.scale = float(teacher.vae.config["scaling_factor"])

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            moments, context = self._encoded(batch)
            mean, std = moments.chunk(2, 1)
            latents = (mean + std * self._on(batch.latent_noise)) * self.scale
            noise, timesteps = self._on(batch.noise), cast(IntTensor, self._on(batch.timesteps))
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            if self.scheduler.config["prediction_type"] == "v_prediction":
                return noisy, timesteps, context, self.scheduler.get_velocity(latents, noise, timesteps)
            return noisy, timesteps, context, noise

    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.moments is not None and batch.context is not None:
            return self._on(batch.moments).float(), self._on(batch.context).float()
        if batch.pixels is None or batch.ids is None:
            raise ValueError("a batch holds pixels and ids, or moments and context")
        if self.encoders is None:  # a cache needs neither, nor their memory
            self.encoders = _frozen(self.teacher.vae, self.device), _frozen(self.teacher.text_encoder, self.device)
        vae, text_encoder = self.encoders
        return encode_pixels(vae, self._on(batch.pixels)), text_encoder(self._on(batch.ids)).last_hidden_state

    def _on(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """torch.compile of every transformer and residual block in place: they are alike, so few compilations serve all.

    The modules between stay as they are, the tapped ones among them."""
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile()


class _SkipCount:
    """Examples that could not be used, of all processes; every process ends where their share is too large."""

    def __init__(self, lost: Skips, limit: float) -> None:
        self.total, self.limit = copy.deepcopy(lost), limit
        self.since = Skips()  # of this process, since they were last put together
        self.told = 0

    def add(self, batch: Batch) -> None:
        self.since.add(batch.skipped, used=len(batch.timesteps))
        for skip in batch.skipped:
            self.told += 1
            if self.told <= TELL_SKIPS:
                logger.warning("skipped %s", skip)

    def check(self, step: int) -> None:
        """At the same steps in every process. Raises DataError."""
        if step % CHECK_SKIPS_EVERY == 0:
            self.gather()
            self.total.check(self.limit)

    def gather(self) -> None:
        """Put together what all processes skipped."""
        for skips in cast(list[Skips], gather_object([self.since])):
            self.total.merge(skips)
        self.since = Skips()

    def summary(self) -> dict[str, object]:
        """Counts by reason, for records."""
        return {"seen": self.total.seen, "skipped": self.total.skipped, "reasons": dict(self.total.reasons)}


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
        self.unet = build_unet(unet_config(teacher.unet.config, row.removal))
        self.captions = list(material.captions[: config.shown])
        self.teachers: Tensor | None = None

    def write(self, step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        """A state's own checkpoint and grid; the curve so far."""
        self.unet.load_state_dict({key.removeprefix("unet."): value for key, value in average.items()})
        checkpoint.save(self._whole(step), staging / "checkpoint", dtype=torch.float16)
        if self.captions:
            self._draw(staging / "samples.png")
        rows = loop.read_log(self.output / "states")
        save_curve([loop.summed(row) for row in rows], self.output / "loss.png", title=f"distilling {self.row.name}")

    def publish(self, **facts: object) -> None:
        """The newest state's checkpoint and grid as the run's, and training.json with all that repeats it."""
        state = checkpointing.load_newest(self.output / "states")
        if state is None:
            raise ResumeError(f"{self.output / 'states'} is gone: run the command again")
        self.unet.load_state_dict({key.removeprefix("unet."): value for key, value in state.groups["ema"].items()})
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
                _frozen(unet, self.device),
                _frozen(self.teacher.text_encoder, self.device),
                _frozen(self.teacher.vae, self.device),
                self.teacher.tokenizer,
                self.teacher.scheduler_config,
                self.captions,
                guidance=self.teacher.guidance_scale,
                seeds=range(len(self.captions)),
                size=self.config.size,
            )
