import copy

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Normal, kl_divergence

from bksdm_training import vae
from bksdm_training.data import Order, read_folder, seeded


@pytest.mark.usefixtures("no_lpips")
@pytest.mark.parametrize(("step", "side", "count"), [(1, 32, 4), (6, 64, 1)])  # a crop of each; the last share whole
def test_the_loss_is_l1_lpips_and_kl(tmp_path, mini_data, mini_config, monkeypatch, step, side, count):
    seen = {}
    monkeypatch.setattr(vae.loop, "run", lambda *arguments, **_: seen.update(loss_at=arguments[2]))
    pictures = read_folder(mini_data / "train", mini_config.size)
    model = vae.train_vae(pictures, mini_config, tmp_path, Accelerator(cpu=True))
    terms = seen["loss_at"](model, step, 0)

    # The same draws in the same order, everything else in float64 from the definitions.
    generator = seeded(mini_config.vae.seed, step)
    pixels = pictures.pixels[Order(len(pictures), 4, mini_config.vae.seed).batch(step)]
    pixels = vae.random_crop(pixels, 32, generator) if side == 32 else pixels[:count]
    assert pixels.shape == (count, 3, side, side)
    x = pixels.double() / 127.5 - 1
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        latent = exact.encode(x).latent_dist
        noise = torch.randn(latent.mean.shape, generator=generator)
        rebuilt = exact.decode(latent.mean + latent.std * noise).sample
    kl = kl_divergence(Normal(latent.mean, latent.std), Normal(0.0, 1.0)).mean()
    expected = {
        "l1": (rebuilt - x).abs().mean(),
        "lpips": 0.5 * (rebuilt - x).square().mean(),  # the weights of TeacherConfig; a squared error stands in
        "kl": 5e-4 * kl,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=6e-6), name  # measured 1.2e-6
