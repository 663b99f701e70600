"""The published Inception from its weights file, features and class logits both, without torchvision.

pytorch-fid and torch-fidelity fetch one file, the TensorFlow network of 2015, as `pt_inception-2015-12-05-6726825d.pth`
and `weights-inception-2015-12-05-6726825d.pth`. Whoever has it needs neither the packaged network, which has no class
head, nor torch-fidelity. Modules have the names that the file has.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bksdm_evaluation import devices
from bksdm_evaluation.inception import SIZE, WIDTH
from bksdm_evaluation.inception_score import CLASSES
from bksdm_evaluation.retrieval import ScoreError

_OF_DAMAGE = (ValueError, LookupError, TypeError, AttributeError)  # what a cut pickle ends in
PUBLISHED = "6726825d"  # how the file's SHA-256 begins, by which torch.hub names it


def load(path: Path) -> InceptionV3:
    """In eval mode, on the CPU. Raises ScoreError where the file is no such file."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, struct.error, pickle.UnpicklingError, *_OF_DAMAGE) as error:
        why = " ".join(str(error).split())[:200]
        raise ScoreError(f"{path} cannot be read as weights: {why or 'it ends early'}") from None
    with torch.device("meta"):
        network = InceptionV3()
    try:
        network.load_state_dict(content, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ScoreError(f"{path} holds no weights of pytorch-fid's Inception: {why}") from None
    if broken := [name for name, value in network.state_dict().items() if not torch.isfinite(value).all()]:
        raise ScoreError(f"{path} holds NaN or infinity, in {broken[0]} first")
    network.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return network.float().eval().requires_grad_(False)


@torch.no_grad()
def logits(network: InceptionV3, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[B, 3, H, W] uint8 -> [B, 1008]: without their bias, as torch-fidelity's Inception score takes them."""
    x = (resized_as_tensorflow(torch.from_numpy(pictures).to(devices.of(network))) - 128) / 128
    return (network(x) @ network.fc.weight.T).double().cpu().numpy()


class BasicConv2d(nn.Module):
    """A convolution, normalised, and ReLU; padded so that at stride 1 the picture keeps its size, or not at all."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, pad: bool = True):
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, across // 2) if pad else 0
        self.conv = nn.Conv2d(width, out, (height, across), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    """Of the 3x3 around each pixel that lie inside, as TensorFlow has it."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(width, 64, 1)
        self.branch5x5_1 = BasicConv2d(width, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5)
        self.branch3x3dbl_1 = BasicConv2d(width, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3)
        self.branch_pool = BasicConv2d(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class InceptionB(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(width, 384, 3, stride=2, pad=False)
        self.branch3x3dbl_1 = BasicConv2d(width, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, 2)], 1)


class InceptionC(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(width, 192, 1)
        self.branch7x7_1 = BasicConv2d(width, inner, 1)
        self.branch7x7_2 = BasicConv2d(inner, inner, (1, 7))
        self.branch7x7_3 = BasicConv2d(inner, 192, (7, 1))
        self.branch7x7dbl_1 = BasicConv2d(width, inner, 1)
        self.branch7x7dbl_2 = BasicConv2d(inner, inner, (7, 1))
        self.branch7x7dbl_3 = BasicConv2d(inner, inner, (1, 7))
        self.branch7x7dbl_4 = BasicConv2d(inner, inner, (7, 1))
        self.branch7x7dbl_5 = BasicConv2d(inner, 192, (1, 7))
        self.branch_pool = BasicConv2d(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(width, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2, pad=False)
        self.branch7x7x3_1 = BasicConv2d(width, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class InceptionE(nn.Module):
    """is_last: it pools by the largest and not by the mean, an error of the original that the scores keep."""

    def __init__(self, width: int, *, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.branch1x1 = BasicConv2d(width, 320, 1)
        self.branch3x3_1 = BasicConv2d(width, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1))
        self.branch3x3dbl_1 = BasicConv2d(width, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1))
        self.branch_pool = BasicConv2d(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(F.max_pool2d(x, 3, 1, 1) if self.is_last else _average(x))
        parts = [self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *parts, pooled], 1)


class InceptionV3(nn.Module):
    """[B, 3, 299, 299] in [-1, 1) -> features [B, 2048]. arXiv 1512.00567, as TensorFlow published it in 2015.

    sha256: of the file that the weights are from.
    """

    sha256: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            InceptionC(768, 128),
            InceptionC(768, 160),
            InceptionC(768, 160),
            InceptionC(768, 192),
        )
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, is_last=False), InceptionE(2048, is_last=True)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)  # [B, 64, 73, 73]
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)  # [B, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        return x.mean((2, 3))


def resized_as_tensorflow(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 -> [B, 3, 299, 299] float32: bilinear, pixel i of the result at i * size / 299 of the picture.

    TensorFlow 1's, whose pixels have their place in their corner, and which torch-fidelity scores by.
    """
    x = pictures.float()
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(SIZE, dtype=torch.float32, device=x.device) * (size / SIZE)
        low = at.long()
        shares = (at - low).view([SIZE if i == axis else 1 for i in range(4)])
        below, above = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
        x = below + (above - below) * shares
    return x
