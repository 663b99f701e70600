import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bksdm_evaluation import inception
from bksdm_evaluation.inception import features, prepare
from bksdm_evaluation.statistics import Statistics, frechet_distance, kernel_distance, squared_discrepancy


class Pooled(nn.Module):
    """Stands where the network stands: channel means, repeated."""

    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299)
        return x.mean((2, 3)).repeat(1, 683)[:, : inception.WIDTH]


def test_pictures_are_scaled_and_resized_as_pytorch_fid_resizes():
    """Bilinear with half-pixel centres, written out: output pixel i looks at (i + 1/2) * size / 299 - 1/2."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    places = np.clip((np.arange(299) + 0.5) * 40 / 299 - 0.5, 0, 39)
    low = np.floor(places).astype(int)
    high, share = np.minimum(low + 1, 39), places - low
    weights = np.zeros((299, 40))
    np.add.at(weights, (np.arange(299), low), 1 - share)
    np.add.at(weights, (np.arange(299), high), share)
    expected = (np.einsum("ih,hwc,jw->cij", weights, picture.astype(np.float64), weights) - 128) / 128
    found = prepare(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert found.shape == (1, 3, 299, 299)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=3e-5)  # measured 8.5e-6
    whole = torch.from_numpy(rng.integers(0, 256, (1, 3, 299, 299)).astype(np.uint8))
    assert torch.equal(prepare(whole), (whole.float() - 128) / 128)


def test_arrays_tensors_and_pictures_give_the_same_in_batches_of_any_size():
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 24, 24, 3)).astype(np.uint8)
    planes = np.moveaxis(pixels, 3, 1)
    told = []
    found = features(Pooled(), planes, 2, told.append)
    assert (found.shape, found.dtype, told) == ((5, 2048), np.float64, [2, 2, 1])
    pictures = [Image.fromarray(one) for one in pixels]
    np.testing.assert_array_equal(found, features(Pooled(), torch.from_numpy(planes.copy())))
    np.testing.assert_array_equal(found, features(Pooled(), pictures, 3))
    mixed = features(Pooled(), [pictures[0].convert("RGBA"), Image.new("L", (9, 7), 255)])
    np.testing.assert_array_equal(mixed[0], found[0])
    np.testing.assert_allclose(mixed[1], 127 / 128)
    assert features(Pooled(), []).shape == (0, 2048)


@pytest.mark.parametrize("pictures", [np.zeros((2, 3, 8, 8)), np.zeros((2, 8, 8, 3), np.uint8)])
def test_pictures_of_another_layout_are_refused(pictures):
    with pytest.raises(ValueError, match=r"must be uint8 \[N, 3, H, W\]"):
        features(Pooled(), pictures)


# Random numbers that torchmetrics' own Inception takes for weights, which it then overwrites, before its documented
# examples draw their pictures: of the convolutions, of the class head, of the head's bias.
_DRAWN_BEFORE = 21_751_136 + 2048 * 1008 + 1008


def _example_pictures(seed):
    torch.manual_seed(seed)
    torch.rand(_DRAWN_BEFORE)
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    return first, torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)


@pytest.fixture(scope="module")
def network():
    return inception.load_network()


@pytest.mark.slow
# 12.6388 in its newer documentation, whose tests begin at seed 42; 12.7202 in the older, after manual_seed(123)
@pytest.mark.parametrize(("seed", "documented"), [(42, 12.6388), (123, 12.7202)])
def test_the_first_layers_give_the_fid_that_torchmetrics_documents(network, seed, documented):
    """FrechetInceptionDistance(feature=64): the mean over the picture of what follows the first pooling."""
    layers = network.net.layers

    def first_layers(pictures):
        rows = []
        with torch.no_grad():
            for batch in pictures.split(10):
                x = layers.conv_2(layers.conv_1(layers.conv(prepare(batch))))
                rows.append(layers.pool0(x).mean((2, 3)).double().numpy())
        return Statistics.of(np.concatenate(rows))

    found = frechet_distance(*map(first_layers, _example_pictures(seed)))
    assert found == pytest.approx(documented, abs=6e-5)  # documented to 4 places; measured 1.9e-5 and 3e-7


@pytest.mark.slow
def test_all_layers_give_the_kid_that_torchmetrics_documents(network):
    """KernelInceptionDistance(subset_size=50) after manual_seed(123): 0.0337 and 0.0023."""
    pictures = _example_pictures(123)
    state = torch.get_rng_state()  # its subsets go on from here
    first, second = (features(network, one, 20) for one in pictures)
    torch.set_rng_state(state)
    scores = [
        squared_discrepancy(first[torch.randperm(100)[:50].numpy()], second[torch.randperm(100)[:50].numpy()])
        for _ in range(100)
    ]
    assert (round(float(np.mean(scores)), 4), round(float(np.std(scores)), 4)) == (0.0337, 0.0023)
    ours = kernel_distance(first, second, subset_size=50)  # other subsets
    assert ours.subset_mean == pytest.approx(0.0337, abs=3 * 0.0023 / 10)
    assert ours.subset_deviation == pytest.approx(0.0023, rel=0.25)
