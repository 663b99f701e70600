import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import signal

from bksdm.perceptual import Lpips, _ArraysOnly


def test_a_pickle_that_holds_code_is_refused():
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        _ArraysOnly(io.BytesIO(pickle.dumps(Evil()))).load()


def _reference(lpips: Lpips, a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS of two [3, H, W] pictures in float64, from the paper's formula and scipy's correlation."""

    def features(x):
        x = (x - lpips.shift.double().numpy()[0]) / lpips.scale.double().numpy()[0]
        out = []
        for index, conv in enumerate(lpips.convs):
            if index in (1, 2):  # max pooling, 3 x 3, stride 2, no padding
                windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
                x = windows[:, ::2, ::2].max((-1, -2))
            weight, bias = conv.weight.double().numpy(), conv.bias.double().numpy()
            p, s = conv.padding[0], conv.stride[0]
            padded = np.pad(x, ((0, 0), (p, p), (p, p)))
            planes = [sum(signal.correlate2d(padded[c], w[c], "valid") for c in range(len(padded))) for w in weight]
            x = np.maximum(np.stack([plane[::s, ::s] for plane in planes]) + bias[:, None, None], 0)
            out.append(x)
        return out

    total = 0.0
    for ours, theirs, head in zip(features(a), features(b), lpips.heads, strict=True):
        units = [f / np.sqrt((f**2).sum(0) + 1e-10) for f in (ours, theirs)]
        total += ((units[0] - units[1]) ** 2 * head.double().numpy()[:, None, None]).sum(0).mean()
    return total


@pytest.mark.slow
def test_lpips_equals_an_independent_float64_computation():
    lpips = Lpips()
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 3, 32, 32))
    with torch.no_grad():
        ours = lpips(torch.tensor(a[None], dtype=torch.float32), torch.tensor(b[None], dtype=torch.float32)).item()
    assert ours == pytest.approx(_reference(lpips, a, b), rel=2e-6)  # measured 2e-7


@pytest.mark.slow
def test_lpips_orders_distortions_and_passes_a_gradient():
    # What is not shown here: the official example's 0.722 / 0.138, whose pictures no package carries.
    lpips = Lpips()
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    noise = torch.randn_like(x)
    distances = [lpips(x, (x + scale * noise).clamp(-1, 1)) for scale in (0.0, 0.05, 0.2, 0.8)]
    assert torch.equal(distances[0], torch.zeros(2))
    assert all((a < b).all() for a, b in itertools.pairwise(distances))
    assert all((head >= 0).all() for head in lpips.heads)
    y = x.clone().requires_grad_()
    lpips(y, x.flip(0)).sum().backward()
    assert torch.isfinite(y.grad).all()
    assert y.grad.abs().sum() > 0
