"""Class pictures that a model draws itself: what DreamBooth's prior preservation (arXiv 2208.12242) holds on to."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bksdm import digests
from bksdm.checkpoint import Checkpoint
from bksdm_training import runs
from bksdm_training.inputs import draw, placed

TOGETHER = 4  # pictures drawn at once


def draw_class(
    base: Checkpoint, prompt: str, count: int, size: int, folder: Path, accelerator: Accelerator, *, steps: int = 25
) -> Path:
    """Fill `folder` with `count` pictures of the prompt, picture i from noise of seed i; what is there is kept.

    The main process draws. Raises ResumeError when the folder holds pictures of something else."""
    now = {"prompt": prompt, "count": count, "size": size, "steps": steps, "weights": digests.of_parts(base)}
    said = {"prompt": "--class-prompt", "count": "--class-count", "size": "--size", "steps": "steps"}
    runs.begin(folder, now, {**said, "weights": "--weights"}, accelerator)
    if accelerator.is_main_process:
        # Whole batches, of which a killed run may have written some: a picture's last digits depend on its batch.
        batches = [range(first, min(first + TOGETHER, count)) for first in range(0, count, TOGETHER)]
        missing = [seeds for seeds in batches if not all(_path(folder, seed).is_file() for seed in seeds)]
        whole = placed(base, accelerator.device) if missing else base
        for seeds in tqdm(missing, "class pictures", unit="batch", dynamic_ncols=True, disable=None):
            pictures = draw(whole, [prompt] * len(seeds), size, seeds=seeds, steps=steps)
            for seed, pixels in zip(seeds, pictures, strict=True):
                _save(pixels, _path(folder, seed))
    accelerator.wait_for_everyone()
    return folder


def _path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:05d}.png"


def _save(pixels: Tensor, path: Path) -> None:
    levels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    staging = path.with_name(f".{path.stem}")  # whole or not there; not a picture by its name
    Image.fromarray(levels).save(staging, format="PNG")
    staging.replace(path)
