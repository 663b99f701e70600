"""A plain rendering of BK-SDM's published training loop (its `kd_train_text_to_image.py`), to measure against.

Of that script: autoencoder and text encoder in every step, in the precision of the run; eager modules; features by
forward hooks into two dicts; AdamW as torch builds it by default; diffusers' EMAModel; each loss read where it is made.
Not of it: what is random comes with the batch, so that another loop can be given the same; nothing is saved; the
average starts from the student (there: from an untrained network)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from bksdm import block_removal
from bksdm.checkpoint import Checkpoint
from bksdm.variants import Variant
from bksdm_training.config import DistillConfig
from bksdm_training.examples import Batch
from bksdm_training.taps import taps

features_of_teacher: dict[str, Any] = {}
features_of_student: dict[str, Any] = {}


def train(
    config: DistillConfig,
    teacher: Checkpoint,
    row: Variant,
    batches: Iterator[Batch],
    accelerator: Accelerator,
    on_step: Callable[[dict[str, float]], None],
) -> None:
    """Train until `batches` end or on_step(figures) raises; figures: task, output, feature and gradient_norm."""
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    noise_scheduler: Any = DDPMScheduler.from_config(teacher.scheduler_config)
    unet: Any = block_removal.compress(teacher.unet, row.removal)
    ema = EMAModel(unet.parameters(), decay=0.9999, model_cls=UNet2DConditionModel, model_config=unet.config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    loop = config.loop
    optimizer: Any = torch.optim.AdamW(
        unet.parameters(),
        lr=loop.learning_rate,
        betas=(loop.beta1, loop.beta2),
        weight_decay=loop.weight_decay,
        eps=loop.epsilon,
    )
    lr_scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema.to(accelerator.device)
    frozen = (teacher.vae, teacher.text_encoder, teacher.unet)
    vae, text_encoder, unet_teacher = (_frozen(module, accelerator.device, weight_dtype) for module in frozen)
    pairs = taps(teacher.unet.config, row.removal)
    for tap in pairs:
        _hook(unet_teacher, tap.teacher, features_of_teacher)
        _hook(unet, tap.student, features_of_student)

    unet.train()
    for batch in batches:
        assert batch.pixels is not None
        assert batch.ids is not None
        pixels = (batch.pixels.to(accelerator.device).float() / 127.5 - 1).to(weight_dtype)
        moments = vae.encode(pixels).latent_dist
        latents = moments.mean + moments.std * batch.latent_noise.to(pixels)
        latents = latents * vae.config.scaling_factor
        noise = batch.noise.to(latents)
        timesteps = batch.timesteps.to(accelerator.device)
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        context = text_encoder(batch.ids.to(accelerator.device))[0]
        target = noise
        if noise_scheduler.config.prediction_type == "v_prediction":
            target = noise_scheduler.get_velocity(latents, noise, timesteps)

        predicted = unet(noisy, timesteps, context).sample
        task = F.mse_loss(predicted.float(), target.float())
        output = F.mse_loss(predicted.float(), unet_teacher(noisy, timesteps, context).sample.float())
        feature = torch.zeros((), device=accelerator.device)
        for tap in pairs:
            theirs, ours = features_of_teacher[tap.teacher], features_of_student[tap.student]
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            ours = ours[0] if isinstance(ours, tuple) else ours
            feature = feature + F.mse_loss(ours.float(), theirs.detach().float())
        loss = task + output + feature

        terms = {"task": task, "output": output, "feature": feature}
        repeated = {key: accelerator.gather(value.repeat(len(timesteps))) for key, value in terms.items()}
        figures = {key: value.mean().item() for key, value in repeated.items()}  # type: ignore[union-attr]
        accelerator.backward(loss)
        norm: Any = accelerator.clip_grad_norm_(unet.parameters(), loop.clip)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        on_step({**figures, "gradient_norm": norm.item()})


def _frozen(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    return nn.Module.to(module, device=device, dtype=dtype).eval().requires_grad_(False)


def _hook(unet: nn.Module, name: str, features: dict[str, Any]) -> None:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        features[name] = output

    unet.get_submodule(name).register_forward_hook(keep)
