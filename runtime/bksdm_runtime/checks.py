"""What a bundle can be asked for: every request resolved and refused before an engine is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from bksdm_runtime.batches import MEMORY_BUDGET, Batch, plan
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.image import open_image, to_rgb
from bksdm_runtime.request import Request, RequestError, check_latents, check_size, check_tile


def check(
    bundle: Bundle, requests: Sequence[Request], *, batch_size: int | None = None, memory_budget: int = MEMORY_BUDGET
) -> tuple[list[Batch], dict[Path, Image.Image]]:
    """The batches that the requests make and the init images that they name, as `generate` will run them.

    Everything that can be refused is refused here, which needs no engine. Raises RequestError, ScheduleError,
    ImageError.
    """
    if batch_size is not None and batch_size < 1:
        raise RequestError(f"batch_size must be at least 1, found {batch_size}")
    whole = [_resolved(bundle, request) for request in requests]
    model = bundle.manifest.model
    batches = plan(whole, bundle.scheduler_config, model.vae_scale_factor, batch_size, memory_budget)
    pictures: dict[Path, Image.Image] = {}
    for request in whole:
        image = request.init_image
        if isinstance(image, Path) and image not in pictures:
            pictures[image] = to_rgb(open_image(image))
        elif isinstance(image, Image.Image):
            to_rgb(image)
    return batches, pictures


def _resolved(bundle: Bundle, request: Request) -> Request:
    """The request with its size and guidance filled in, checked against what the bundle can do."""
    model = bundle.manifest.model
    height = model.height if request.height is None else request.height
    width = model.width if request.width is None else request.width
    check_size("height", height, model.size_multiple)
    check_size("width", width, model.size_multiple)
    if request.init_image is not None and "vae_encoder" not in bundle.manifest.components:
        raise RequestError(
            "this bundle has no VAE encoder, so it cannot start from a picture: export it again with one"
        )
    if request.vae_tile is not None:
        check_tile(request.vae_tile, model.size_multiple, model.vae_scale_factor)
    if request.cache_interval > 1 and "unet_shallow" not in bundle.manifest.components:
        raise RequestError(
            "this bundle has no shallow U-Net, so no steps can be cached: export it again with --step-cache"
        )
    if request.latents is not None:
        h, w = height // model.vae_scale_factor, width // model.vae_scale_factor
        check_latents(request.latents, (model.latent_channels, h, w))
    guidance = model.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return replace(request, height=height, width=width, guidance_scale=guidance)
