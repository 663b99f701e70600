"""Fine-tuning by low-rank adapters (LoRA, arXiv 2106.09685), top to bottom: a frozen model learns a style or, with
DreamBooth's prompts, a subject, and what it learnt is a file of a few megabytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from torch import Tensor, nn

from bksdm import digests, licence, lora
from bksdm.checkpoint import Checkpoint
from bksdm.components import with_clip_prefix
from bksdm_training import fit, records, runs
from bksdm_training.charts import save_grid
from bksdm_training.checkpointing import State
from bksdm_training.config import AdaptConfig
from bksdm_training.data import DataError
from bksdm_training.examples import Batch
from bksdm_training.inputs import Inputs, draw, placed
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
        "data": fit.described(material),
        "weights": digests.of_parts(base),
        "precision": str(accelerator.mixed_precision),
    }
    said = {"settings": "settings", "data": "data", "weights": "--weights", "precision": "--mixed-precision"}
    runs.begin(output, now, said, accelerator)
    device = accelerator.device
    adapters = Adapters(base, config, device, fit.network_dtype(accelerator))
    prepare = Inputs(base, device)

    def loss_of(model: nn.Module, batch: Batch, positions: range) -> dict[str, Tensor]:
        noisy, timesteps, target = prepare.noised(batch)
        text = cast(Tensor, batch.ids).to(device) if config.text_encoder else prepare.context(batch)
        predicted = model(noisy, timesteps, text)
        error = (predicted.float() - target).square().mean((1, 2, 3))  # [B]
        if config.prior_weight is None:
            return {"task": error.mean()}
        is_prior = torch.tensor([position % 2 for position in positions], device=device)
        # Each a mean over its own half of the step's batch, wherever this part's pictures lie.
        return {
            "task": 2 * (error * (1 - is_prior)).mean(),
            "prior": config.prior_weight * 2 * (error * is_prior).mean(),
        }

    product = _Adapted(config, base, material, output, device, prompts, sum(w.numel() for w in adapters.parameters()))
    made_on = runs.made_on(now["data"], now["weights"])
    fit.fit("lora", adapters, loss_of, product, config, material, output, accelerator, made_on=made_on)
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


class _Adapted:
    """The averaged adapters with their licence, and pictures of the base above the adapted model's: a fit.Product."""

    def __init__(
        self,
        config: AdaptConfig,
        base: Checkpoint,
        material: Material,
        output: Path,
        device: torch.device,
        prompts: Sequence[str],
        trained: int,
    ) -> None:
        """trained: how many numbers the adapters are."""
        self.config, self.base, self.material = config, base, material
        self.output, self.device, self.trained = output, device, trained
        shown = max(config.shown, len(prompts)) if config.shown else 0
        # Few prompts, as DreamBooth's one, are drawn several times, each from noise of its own.
        self.prompts = list(islice(cycle(prompts or material.captions), shown))

    @cached_property
    def before(self) -> Tensor:
        """The base's pictures, drawn once."""
        return self._pictures(self.base)

    def write(self, step: int, average: Mapping[str, Tensor], staging: Path) -> None:
        save_adapters(average, self.config, staging / lora.FILE)
        terms = self.base.licence
        if self.material.terms is not None:
            terms = licence.joined(terms, self.material.terms)
        changed = f"Changed: these low-rank adapters are changes to {self.base.source}, trained for {step} steps."
        (staging / "LICENSE").write_text(f"{changed}\n\n{terms.notice}", encoding="utf-8")

    def show(self, step: int, average: Mapping[str, Tensor], folder: Path) -> None:
        """Base above adapted, from the same noise."""
        if self.prompts:
            adapted = lora.merge(self.base, folder / lora.FILE)
            pictures = torch.cat([self.before, self._pictures(adapted)])
            save_grid(pictures, folder / "samples.png", columns=len(self.prompts), captions=self.prompts * 2)

    def publish(self, state: State, folder: Path) -> dict[str, object]:
        if not (folder / "samples.png").is_file():  # killed before it was drawn
            self.show(state.step, state.groups["ema"], folder)
        for name in (lora.FILE, "LICENSE", "samples.png"):
            records.copy_whole(folder / name, self.output)
        return {"weights": self.base.source, "prompts": self.prompts, "trained": self.trained}

    def _pictures(self, whole: Checkpoint) -> Tensor:
        return draw(placed(whole, self.device), self.prompts, self.config.size, seeds=range(len(self.prompts)))
