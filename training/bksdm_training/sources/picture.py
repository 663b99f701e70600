"""From the bytes of a picture file to the square of pixels that training sees."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from bksdm_training.sources.skips import BrokenExample

# What image data sets hold. Others stay shut: the data comes from the web, and EPS, for one, runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Past this ratio of the sides the strip that is resized and cropped would fill the memory (1 x 10,000 px: 8 GB at 512).
LONGEST = 16


def decode(key: str, content: bytes) -> Image.Image:
    """The picture in a file's bytes as RGB (see to_rgb); of an animation, the first frame. Raises BrokenExample."""
    if not content:
        raise BrokenExample(key, "empty image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of a hundred harmless oddities of web pictures; past 89 megapixels it is no oddity.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                picture = to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BrokenExample(key, "decompression bomb", error) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's own, zlib's, struct's and each plugin's: a broken file raises anything
        reason = "unknown image format" if isinstance(error, Image.UnidentifiedImageError) else "undecodable image"
        raise BrokenExample(key, reason, "" if reason == "unknown image format" else error) from None
    if 0 in picture.size:
        raise BrokenExample(key, "empty image", f"{picture.width} x {picture.height} px")
    return picture


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB: 16-bit greys rescaled, transparency over white, upright by its EXIF.

    The published transforms left pictures as they lie and transparent pixels as they happen to be coloured. A caption
    speaks of the picture as it is shown, so both are put right here. Colour profiles are ignored, as published.
    Nothing but pixels is kept: what says how to turn or read them no longer holds.
    Raises ValueError on floating-point pixels, whose white nobody knows, and on modes without a way to RGB."""
    rgb = _to_rgb(image)
    rgb.info = {}
    return rgb


def prepare(image: Image.Image, size: int, flip: bool) -> Tensor:
    """A picture as training sees it: uint8 [3, size, size].

    The transforms BK-SDM published, torchvision on Pillow images: Resize(size, bilinear, antialiased) of the shorter
    side, the longer one rounded down; CenterCrop(size), which rounds half to even; a horizontal flip if asked."""
    rgb = image if image.mode == "RGB" and not image.info else to_rgb(image)
    short, long = min(rgb.size), max(rgb.size)
    length = int(size * long / short)
    first = round((length - size) / 2)
    if long > LONGEST * short:
        square = _middle(rgb, size, length, first)
    else:
        width, height = (size, length) if rgb.width <= rgb.height else (length, size)
        left, top = (0, first) if rgb.width <= rgb.height else (first, 0)
        square = rgb.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    if flip:
        square = ImageOps.mirror(square)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if (orientation := _orientation(image)) is not None:
        image = image.transpose(orientation)
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range")
    if image.mode.startswith("I"):
        return _from_grey16(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _middle(rgb: Image.Image, size: int, length: int, first: int) -> Image.Image:
    """The crop alone, resized from its place in the picture: the same to one level, and of bounded memory."""
    scale = max(rgb.size) / length
    start, end = first * scale, (first + size) * scale
    box = (0, start, rgb.width, end) if rgb.width <= rgb.height else (start, 0, end, rgb.height)
    return rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How to turn a picture upright, None where it lies so."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF block raises anything, and the pixels beside it are whole
        return None
    return _UPRIGHT.get(value) if isinstance(value, int) else None


_UPRIGHT = {  # EXIF 2.3, tag 274
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _from_grey16(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)  # [H, W] uint16 or int32
    if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
        raise ValueError(f"levels from {levels.min()} to {levels.max()}, past 16 bits")
    grey = np.rint(levels / 257).astype(np.uint8)  # 65535 / 255
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
