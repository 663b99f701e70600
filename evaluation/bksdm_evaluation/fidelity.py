"""torch-fidelity's Inception, whose class logits the published Inception scores are made of. Needs torchvision."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports] - an extra
    FeatureExtractorInceptionV3,
)

from bksdm_evaluation import devices

_LOGITS = "logits_unbiased"


def load_network(device: torch.device) -> torch.nn.Module:
    """With its published weights, which torch-fidelity fetches once."""
    return FeatureExtractorInceptionV3("inception-v3-compat", [_LOGITS]).eval().to(device)


@torch.no_grad()
def logits(network: torch.nn.Module, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[B, 3, H, W] uint8 -> [B, 1008]; the network resizes as TensorFlow does."""
    (found,) = network(torch.from_numpy(pictures).to(devices.of(network)))
    return found.double().cpu().numpy()
