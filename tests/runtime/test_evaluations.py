"""What each evaluation computes, against rows written out by hand."""

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from bksdm_runtime.evaluations import Evaluation, plan_evaluations


def rows(*args: int, **kwargs: object) -> str:
    """One letter each: G guided, u unguided, of a whole evaluation; g, _ of a shallow one."""
    letters = {(True, True): "G", (False, True): "u", (True, False): "g", (False, False): "_"}
    return "".join(letters[e.guided, e.full] for e in plan_evaluations(*args, **kwargs))  # type: ignore[arg-type]


def test_by_default_every_evaluation_is_whole() -> None:
    assert plan_evaluations(2, guided=True) == (Evaluation(guided=True, full=True),) * 2
    assert rows(4, guided=True) == "GGGG"
    assert rows(4, guided=False) == "uuuu"


def test_every_so_many_is_whole() -> None:
    assert rows(7, guided=True, cache_interval=3) == "GggGggG"
    assert rows(7, guided=False, cache_interval=2) == "u_u_u_u"
    assert rows(3, guided=True, cache_interval=9) == "Ggg"


def test_guidance_ends_and_begins_where_diffusers_guiders_do() -> None:
    assert rows(10, guided=True, guidance_interval=(0.0, 0.8)) == "GGGGGGGGuu"
    assert rows(10, guided=True, guidance_interval=(0.25, 0.75)) == "uuGGGGGuuu"
    assert rows(10, guided=False, guidance_interval=(0.25, 0.75)) == "uuuuuuuuuu"


def test_turning_guided_needs_the_negative_prompts_features_anew() -> None:
    assert rows(8, guided=True, cache_interval=4, guidance_interval=(0.25, 0.75)) == "u_GgGg__"
    assert rows(6, guided=True, cache_interval=6, guidance_interval=(0.5, 1.0)) == "u__Ggg"


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.8), (0.29, 0.57), (0.333, 1.0)])
@pytest.mark.parametrize("count", [1, 7, 25, 100])
def test_the_interval_is_that_of_diffusers_guiders(interval: tuple[float, float], count: int) -> None:
    guider = ClassifierFreeGuidance(start=interval[0], stop=interval[1])
    planned = plan_evaluations(count, guided=True, guidance_interval=interval)
    for i, evaluation in enumerate(planned):
        guider.set_state(step=i, num_inference_steps=count, timestep=torch.tensor(0))
        assert evaluation.guided == guider._is_cfg_enabled(), i
