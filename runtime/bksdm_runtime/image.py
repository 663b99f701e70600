"""Pictures: pixels to and from the VAE's range, and PNG files that carry the request that made them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from bksdm_runtime.request import Request, RequestError

# How the common image tools name our samplers in a `parameters` chunk.
_TOOL_NAMES = {"pndm": "PLMS", "ddim": "DDIM", "euler": "Euler", "dpmsolver++": "DPM++ 2M"}
# Far past what any memory holds and any processor has; a damaged picture must not ask for more.
MAX_BATCH = 1024
MAX_THREADS = 4096


class ImageError(Exception):
    """A picture that cannot be read or written; the message is one sentence for the user."""


@dataclass(frozen=True)
class Provenance:
    """What made a picture, besides its request.

    bundle: the bundle's hash (see bundle.Bundle.sha256); init_image: SHA-256 of the init image's file, "" without.
    batch_size, batch_index, threads: a backend may round differently in another batch or on another number of threads,
    so they belong to what makes the same picture again bit for bit.
    arithmetic: see engine.Engine; "auto" in a picture of before it was kept, which ONNX Runtime made in its only one.
    token_downsampling: the bundle's, see manifest.Manifest.
    """

    bundle: str
    variant: str
    backend: str
    precision: str
    version: str
    batch_size: int = 1
    batch_index: int = 0
    threads: int = 1
    arithmetic: str = "auto"
    init_image: str = ""
    token_downsampling: int = 1


def to_uint8(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Decoded pictures [B, 3, H, W] in about [-1, 1] -> [B, H, W, 3] uint8.

    Rounds as diffusers' VaeImageProcessor does (denormalize, then numpy_to_pil).
    """
    unit = np.minimum(np.maximum(decoded / np.float32(2) + np.float32(0.5), 0), 1)
    levels = np.rint(unit * np.float32(255)).astype(np.uint8)
    return np.moveaxis(levels, 1, 3)


def from_image(image: Image.Image, height: int, width: int) -> NDArray[np.float32]:
    """A picture -> [1, 3, height, width] float32 in [-1, 1], resized as diffusers' VaeImageProcessor does (Lanczos).

    Raises ImageError, as to_rgb does.
    """
    resized = to_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
    levels = np.asarray(resized, dtype=np.float32)  # [H, W, 3]
    symmetric = (levels / np.float32(255) * np.float32(2) - np.float32(1)).astype(np.float32)
    return np.moveaxis(symmetric, 2, 0)[None]


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB: upright, 16-bit greys rescaled, transparency over white.

    Raises ImageError on floating-point pictures and on integers past 16 bits, whose white nobody knows.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ImageError("the init image has floating-point pixels, of unknown range: save it with 8 or 16 bits")
    try:
        if upright.mode.startswith("I"):
            return _from_grey16(upright)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    except ValueError as error:  # Pillow knows no way from, say, LAB
        raise ImageError(f"the init image cannot be turned to RGB: {_first_line(error)}") from None


def open_image(path: Path) -> Image.Image:
    """Read any picture that Pillow reads, whole. Raises ImageError."""
    with _decoding(path):
        image = Image.open(path)
        with image:
            image.load()
        return image


def save_png(path: Path, pixels: NDArray[np.uint8], request: Request, provenance: Provenance) -> None:
    """Write [H, W, 3] uint8 as PNG with the request in text chunks; whole or not at all. Raises ImageError."""
    write_whole(path, encode_png(pixels, request, provenance))


def write_whole(path: Path, content: bytes) -> None:
    """Write a picture's file whole or not at all. Raises ImageError."""
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.part")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}") from None


def refuse_unwritable(folder: Path) -> None:
    """Notice before minutes of work that a folder of pictures cannot be made or written; make nothing yet.

    Raises ImageError.
    """
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path())
    if not there.is_dir():
        raise ImageError(f"folder {folder} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ImageError(f"folder {folder} cannot be written: Permission denied")


def make_folder(folder: Path) -> None:
    """Raises ImageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"folder {folder} cannot be made: {error.strerror or error}") from None


def encode_png(pixels: NDArray[np.uint8], request: Request, provenance: Provenance) -> bytes:
    """The content of the file that save_png writes."""
    buffer = io.BytesIO()
    height, width = pixels.shape[:2]
    chunks = PngImagePlugin.PngInfo()
    for name, text in _texts(request, provenance, height, width).items():
        if text.isascii():
            chunks.add_text(name, text)
        else:
            chunks.add_itxt(name, text)  # UTF-8; a plain chunk is Latin-1
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_request(path: Path) -> tuple[Request, Provenance]:
    """The request and the provenance that save_png wrote. Raises ImageError when there are none, or damaged ones."""
    with _decoding(path):
        image = Image.open(path)
        with image:
            information = cast("dict[object, object]", image.info)
        texts = {str(name): str(text) for name, text in information.items() if isinstance(text, str)}
    if not texts.get("Software", "").startswith("bksdm ") or "bundle" not in texts:
        raise ImageError(f"{path} does not say how it was made: only a PNG written by bksdm-run does")
    if "latents_sha256" in texts:
        raise ImageError(f"{path} was drawn from latents that its maker gave, which it does not hold")
    try:
        request = Request(
            prompt=texts["prompt"],
            negative_prompt=texts["negative_prompt"],
            seed=int(texts["seed"]),
            steps=int(texts["steps"]),
            guidance_scale=float(texts["guidance_scale"]),
            height=int(texts["height"]),
            width=int(texts["width"]),
            sampler=texts["sampler"],
            init_image=Path(texts["init_image"]) if "init_image" in texts else None,
            strength=float(texts["strength"]) if "strength" in texts else Request.strength,
            noise=texts["noise"],
            guidance_interval=_interval(texts.get("guidance_interval", "0 1")),  # older pictures say neither
            cache_interval=int(texts.get("cache_interval", "1")),
            vae_tile=int(texts["vae_tile"]) if "vae_tile" in texts else None,
        )
        provenance = Provenance(
            bundle=texts["bundle"],
            variant=texts["variant"],
            backend=texts["backend"],
            precision=texts["precision"],
            version=texts["Software"].removeprefix("bksdm "),
            batch_size=int(texts["batch_size"]),
            batch_index=int(texts["batch_index"]),
            threads=int(texts["threads"]),
            arithmetic=texts.get("arithmetic", "auto"),
            init_image=texts.get("init_image_sha256", ""),
            token_downsampling=int(texts.get("token_downsampling", "1")),
        )
        if provenance.arithmetic not in ("auto", "f32", "bf16", "f16"):
            raise ValueError(f"arithmetic {ascii(provenance.arithmetic)[:20]} is unknown")
        possible = 0 <= provenance.batch_index < provenance.batch_size <= MAX_BATCH
        if not possible or not 1 <= provenance.threads <= MAX_THREADS:
            raise ValueError("its batch or its threads make no sense")
    except KeyError as error:
        raise ImageError(f"{path} does not say how it was made: its {error.args[0]} is missing") from None
    except (RequestError, ValueError) as error:
        raise ImageError(f"{path} says wrongly how it was made: {_first_line(error)}") from None
    return request, provenance


def _interval(text: str) -> tuple[float, float]:
    start, end = text.split()
    return float(start), float(end)


def _texts(request: Request, provenance: Provenance, height: int, width: int) -> Mapping[str, str]:
    """Text chunks, in order: the form that common tools read, then one chunk for each value."""
    texts = {
        "parameters": _parameters(request, provenance, height, width),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": str(request.seed),
        "steps": str(request.steps),
        "sampler": request.sampler,
        "guidance_scale": repr(float(request.guidance)),
        "height": str(height),
        "width": str(width),
        "noise": request.noise,
        "guidance_interval": " ".join(map(repr, map(float, request.guidance_interval))),
        "cache_interval": str(request.cache_interval),
        "bundle": provenance.bundle,
        "variant": provenance.variant,
        "backend": provenance.backend,
        "precision": provenance.precision,
        "batch_size": str(provenance.batch_size),
        "batch_index": str(provenance.batch_index),
        "threads": str(provenance.threads),
        "arithmetic": provenance.arithmetic,
        "Software": f"bksdm {provenance.version}",
    }
    if provenance.token_downsampling > 1:
        texts["token_downsampling"] = str(provenance.token_downsampling)
    if request.vae_tile is not None:
        texts["vae_tile"] = str(request.vae_tile)
    if request.latents is not None:
        texts["latents_sha256"] = hashlib.sha256(np.ascontiguousarray(request.latents).data).hexdigest()
    if isinstance(request.init_image, Path):
        texts["init_image"] = str(request.init_image)
        texts["init_image_sha256"] = provenance.init_image
    if request.init_image is not None:
        texts["strength"] = repr(float(request.strength))
    return texts


def _parameters(request: Request, provenance: Provenance, height: int, width: int) -> str:
    """The request as AUTOMATIC1111's web UI writes it, which most image tools read."""
    settings = {
        "Steps": str(request.steps),
        "Sampler": _TOOL_NAMES[request.sampler],
        "CFG scale": f"{request.guidance:g}",
        "Seed": str(request.seed),
        "Size": f"{width}x{height}",
        "Model hash": provenance.bundle[:10],
        "Model": provenance.variant,
    }
    if request.init_image is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    if request.guidance_interval != Request.guidance_interval:
        settings["Guidance interval"] = "{:g}-{:g}".format(*request.guidance_interval)
    if request.cache_interval > 1:
        settings["Cache interval"] = str(request.cache_interval)
    if provenance.token_downsampling > 1:
        settings["Token downsampling"] = str(provenance.token_downsampling)
    if request.vae_tile is not None:
        settings["VAE tile"] = str(request.vae_tile)
    settings["Version"] = f"bksdm {provenance.version}"
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def _from_grey16(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)  # [H, W] uint16 or int32
    if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
        raise ImageError(
            f"the init image has levels from {levels.min()} to {levels.max()}: save it with 8 or 16 bits, 0 to 65535"
        )
    grey = np.rint(levels / 257).astype(np.uint8)  # 65535 / 255
    transparent = cast("dict[object, object]", image.info).get("transparency")
    if isinstance(transparent, int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


@contextmanager
def _decoding(path: Path) -> Generator[None, None, None]:
    """Whatever a decoder raises on a file that is not, or only half, a picture becomes ImageError."""
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError:
        raise ImageError(f"there is no picture {path}") from None
    except Exception as error:  # Pillow's own, zlib's, struct's, and those of plugins: AVIF raises RuntimeError
        reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
        raise ImageError(f"{path} cannot be read as a picture: {reason}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
