"""Fine-tuning by low-rank adapters (LoRA, arXiv 2106.09685), top to bottom: a frozen model learns a style or, with
DreamBooth's prompts, a subject, and what it learnt is a file of a few megabytes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from torch import Tensor, nn

from bksdm import licence, lora
from bksdm.checkpoint import Checkpoint
from bksdm.components import with_clip_prefix
from bksdm.sampling import sample
from bksdm_training import checkpointing, loop, records, runs
from bksdm_training.charts import save_curve, save_grid
from bksdm_training.checkpointing import ResumeError
from bksdm_training.config import AdaptConfig
from bksdm_training.data import DataError
from bksdm_training.examples import Feed
from bksdm_training.inputs import Inputs, frozen
from bksdm_training.material import Material

TARGETS = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj")}


def adapt(
    config: AdaptConfig,
    base: Checkpoint,
    material: Material,
    output: Path,
    accelerator: Accelerator,
    *,
    prompts: Sequence[str] = (),
) -> Path:
    """Train adapters of `base`; returns their file, which diffusers' load_lora_weights and bksdm.lora.merge take.

    prompts: of the grids, instead of the material's captions. Goes on from what `output` holds of an earlier run with
    the same settings, data and base; every state there holds a file of its own. Under `accelerate launch` every process
    calls this; the model is whole in each.
    Raises ResumeError, DataError (too much of the data is unusable), DivergedError."""
    if config.text_encoder and material.about["kind"] == "cache":
        raise DataError("a cache holds what the text encoder gave, and it is to be trained: give the pictures")
    now = {
        "settings": runs.settings(config),
        "data": {**material.about, "identity": material.examples.identity},
        "weights": runs.digests(base),
        "precision": str(accelerator.mixed_precision),
    }
    said = {"settings": "settings", "data": "data", "weights": "--weights", "precision": "--mixed-precision"}
    runs.begin(output, now, said, accelerator)
    device = accelerator.device
    parts = config.parts(accelerator.num_processes)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    adapters = Adapters(base, config, device, dtype)
    prepare = Inputs(base, device)
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

    def loss_at(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        batch = feed.batch(step, part)
        skips.add(batch)
        noisy, timesteps, target = prepare.noised(batch)
        text = cast(Tensor, batch.ids).to(device) if config.text_encoder else prepare.context(batch)
        predicted = model(noisy, timesteps, text)
        error = (predicted.float() - target).square().mean((1, 2, 3))  # [B]
        if config.prior_weight is None:
            return {"task": error.mean()}
        is_prior = torch.tensor([position % 2 for position in feed.positions(step, part)], device=device)
        # Each a mean over its own half of the step's batch, wherever this part's pictures lie.
        return {
            "task": 2 * (error * (1 - is_prior)).mean(),
            "prior": config.prior_weight * 2 * (error * is_prior).mean(),
        }

    finish = _Checkpoints(config, base, material, output, device, prompts)
    runs.track(accelerator, "lora", output / "states")

    def on_checkpoint(step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        finish.write(step, average, staging)
        skips.write(staging)

    loop.run(
        "lora",
        adapters,
        loss_at,
        replace(config.loop, accumulate=parts),
        output / "states",
        accelerator=accelerator,
        on_checkpoint=on_checkpoint,
        on_saved=finish.show,
        made_on=runs.made_on(now["data"], now["weights"]),
        on_step=lambda step: skips.check(step, config.loop),
    )
    if accelerator.is_main_process and (skips.taken or not (output / "training.json").is_file()):
        finish.publish(
            trained=sum(weight.numel() for weight in adapters.parameters()),
            skipped=skips.summary(),
            processes=accelerator.num_processes,
            parts=parts,
            mixed_precision=str(accelerator.mixed_precision),
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it ends the processes' group
    return output / lora.FILE


class Adapters(nn.Module):
    """The low-rank weights alone, float32, as one module that predicts with the networks they sit in.

    Those are frozen and not its submodules: what is averaged, saved, and sent between processes is what is trained."""

    def __init__(self, base: Checkpoint, config: AdaptConfig, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the frozen weights."""
        super().__init__()
        torch.manual_seed(config.loop.seed)
        unet = _adapted(base.unet, "unet", config, device, dtype)
        text_encoder = None
        if config.text_encoder:
            text_encoder = _adapted(base.text_encoder, "text_encoder", config, device, dtype)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self._networks: tuple[Any, Any] = (unet, text_encoder)  # a tuple, which registers none
        weights = {
            f"{part}.{name}".replace(".", "/"): weight  # torch allows no dot in a parameter's name
            for part, network in zip(TARGETS, self._networks, strict=True)
            if network is not None
            for name, weight in network.named_parameters()
            if weight.requires_grad
        }
        self.weights = nn.ParameterDict(weights)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Noise or velocity [B, 4, h, w]. text: context [B, 77, D]; ids [B, 77] where that encoder is adapted too."""
        unet, text_encoder = self._networks
        context = text if text_encoder is None else text_encoder(text).last_hidden_state
        return unet(noisy, timesteps, context, return_dict=False)[0]


def _adapted(network: Any, part: str, config: AdaptConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen copy with fresh adapters, which at first change nothing: B is zero."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    network.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - any number serves
            init_lora_weights="gaussian",  # as in diffusers' own scripts
            target_modules=list(TARGETS[part]),
        )
    )
    for parameter in network.parameters():
        parameter.data = parameter.data.to(device, torch.float32 if parameter.requires_grad else dtype)
    return nn.Module.to(network, device)  # the buffers


def save_adapters(weights: Mapping[str, Tensor], config: AdaptConfig, path: Path) -> None:
    """Write what `Adapters` calls its weights in diffusers' layout.

    Alpha over rank goes into B: a reader that finds no alpha takes it for the rank, and not all read PEFT's header."""
    tensors = {}
    for key, weight in weights.items():
        part, _, name = key.removeprefix("weights.").replace("/", ".").replace(".default.", ".").partition(".")
        name = with_clip_prefix(name) if part == "text_encoder" else name
        tensors[f"{part}.{name}"] = weight * (config.alpha / config.rank) if ".lora_B." in name else weight
    records.save_tensors(convert_state_dict_to_diffusers(tensors), path)


class _Checkpoints:
    """Writes the averaged adapters with their licence, and pictures of the base above those of the adapted model."""

    def __init__(
        self,
        config: AdaptConfig,
        base: Checkpoint,
        material: Material,
        output: Path,
        device: torch.device,
        prompts: Sequence[str],
    ) -> None:
        self.config, self.base, self.material = config, base, material
        self.output, self.device = output, device
        shown = max(config.shown, len(prompts)) if config.shown else 0
        # Few prompts, as DreamBooth's one, are drawn several times, each from noise of its own.
        self.prompts = list(islice(cycle(prompts or material.captions), shown))
        self.before: Tensor | None = None

    def write(self, step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        """A state's own file and licence."""
        save_adapters(average, self.config, staging / lora.FILE)
        terms = self.base.licence
        if self.material.terms is not None:
            terms = licence.joined(terms, self.material.terms)
        changed = f"Changed: these low-rank adapters are changes to {self.base.source}, trained for {step} steps."
        (staging / "LICENSE").write_text(f"{changed}\n\n{terms.notice}", encoding="utf-8")

    def show(self, _step: int, _average: Mapping[str, Tensor], state: Path) -> None:
        """A state's grid, and the curve so far."""
        rows = loop.read_log(self.output / "states")
        save_curve([loop.summed(row) for row in rows], self.output / "loss.png", title="fine-tuning")
        if self.prompts:
            self._draw(lora.merge(self.base, state / lora.FILE), state / "samples.png")

    def publish(self, **facts: object) -> None:
        """The newest state's files as the run's, and training.json with all that repeats it."""
        state = checkpointing.load_newest(self.output / "states")
        if state is None:
            raise ResumeError(f"{self.output / 'states'} is gone: run the command again")
        for name in (lora.FILE, "LICENSE", "samples.png"):
            path = self.output / "states" / f"step-{state.step:08d}" / name
            if path.is_file():
                shutil.copyfile(path, self.output / f".{name}")
                (self.output / f".{name}").replace(self.output / name)
        written = {
            "weights": self.base.source,
            "config": asdict(self.config),
            "data": {**self.material.about, "identity": self.material.examples.identity},
            "prompts": self.prompts,
            "seconds": round(float(str(state.facts["seconds"]))),
            **facts,
            **records.machine(self.device, "transformers", "accelerate", "peft"),
        }
        records.write_json(self.output / "training.json", written)

    def _draw(self, adapted: Checkpoint, path: Path) -> None:
        if self.before is None:
            self.before = self._pictures(self.base)
        pictures = torch.cat([self.before, self._pictures(adapted)])
        save_grid(pictures, path, columns=len(self.prompts), captions=self.prompts * 2)

    def _pictures(self, whole: Checkpoint) -> Tensor:
        half = self.device.type == "cuda"
        with torch.autocast("cuda", torch.float16) if half else nullcontext():
            return sample(
                frozen(whole.unet, self.device),
                frozen(whole.text_encoder, self.device),
                frozen(whole.vae, self.device),
                whole.tokenizer,
                whole.scheduler_config,
                self.prompts,
                guidance=whole.guidance_scale,
                seeds=range(len(self.prompts)),
                size=self.config.size,
            )
