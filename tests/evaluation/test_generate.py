import pytest

from bksdm_evaluation.generate import generate
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline


def test_progress_adds_up_to_the_number_of_pictures_whatever_the_sampler_evaluates():
    told = []
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime", threads=1))
    pictures = generate(
        pipeline,
        ["a red apple", "a dog", "a boat"],
        steps=3,
        guidance_scale=2.0,
        seed=0,
        on_step=told.append,
        batch_size=2,
    )
    assert len(pictures) == 3
    assert sum(told) == pytest.approx(3)
    assert pictures[0].tobytes() != pictures[1].tobytes()
