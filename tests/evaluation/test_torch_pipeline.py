from dataclasses import replace

import numpy as np
import pytest
import torch

from bksdm import checkpoint
from bksdm_evaluation import generate as through_runtime
from bksdm_evaluation.retrieval import ScoreError
from bksdm_evaluation.torch_pipeline import generate
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline

CAPTIONS = ["a hot dog, 3d icon", "a crab, 3d icon", "a shamrock, 3d icon", "something never seen"]


def _pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_a_seed_gives_the_picture_of_the_exported_bundle(guidance):
    demo = checkpoint.load("demo")
    drawn = generate(demo, CAPTIONS, seed=7, batch_size=3, guidance_scale=guidance, on_step=lambda share: None)
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime", threads=1))
    expected = through_runtime.generate(
        pipeline,
        CAPTIONS,
        steps=25,
        guidance_scale=guidance or demo.guidance_scale,
        seed=7,
        batch_size=3,
        on_step=lambda share: None,
    )
    ours, theirs = _pixels(drawn), _pixels(expected)
    assert ours.shape == theirs.shape == (4, 128, 128, 3)
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1  # of 255; measured 1
    assert difference.mean() < 3e-4  # measured 4.1e-5 and, unguided, 1.5e-5


def test_a_picture_does_not_depend_on_its_place_in_a_batch(mini_checkpoint):
    told = []
    settings = {"steps": 3, "guidance_scale": 3.0}
    together = _pixels(
        generate(mini_checkpoint, ["a", "b", "c"], seed=5, batch_size=2, on_step=told.append, **settings)
    )
    alone = _pixels(generate(mini_checkpoint, ["c"], seed=7, on_step=told.append, **settings))
    assert np.abs(together[2:] - alone).max() <= 1  # measured 0 over 4 models
    assert sum(told) == pytest.approx(4)
    assert (together[0] != together[1]).any()


def test_guidance_is_the_checkpoints_own_unless_given(mini_checkpoint):
    def draw(model, guidance):
        return _pixels(generate(model, ["a"], steps=2, guidance_scale=guidance, on_step=lambda share: None))

    strong = replace(mini_checkpoint, guidance_scale=9.0)
    np.testing.assert_array_equal(draw(strong, None), draw(mini_checkpoint, 9.0))
    assert (draw(strong, None) != draw(mini_checkpoint, 1.0)).any()


def test_a_students_nan_is_one_sentence(build_mini):
    broken = build_mini()
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ScoreError, match=r"the U-Net of mini\(seed=0\) gives NaN"):
        generate(broken, ["a"], steps=1, on_step=lambda share: None)
    broken = build_mini()
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ScoreError, match=r"the VAE of mini\(seed=0\) gives NaN"):
        generate(broken, ["a"], steps=1, on_step=lambda share: None)
