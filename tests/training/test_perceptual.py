import io
import itertools
import pickle

import pytest
import torch

from bksdm_training.perceptual import Lpips, _ArraysOnly


def test_a_pickle_that_holds_code_is_refused():
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        _ArraysOnly(io.BytesIO(pickle.dumps(Evil()))).load()


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
