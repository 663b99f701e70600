"""Every coefficient table against diffusers' scheduler, driven by the same non-linear toy model.

diffusers keeps alphas_cumprod in float32 and Euler and DPM-Solver++ also step in float32 whatever they are given, while
the tables are float64. The error is judged against the largest value of the whole array.
"""

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from bksdm_runtime.schedule import SAMPLERS, Schedule, ScheduleError, StepsError, make_schedule
from bksdm_runtime.scheduler_settings import read_settings

CLASSES: dict[str, Any] = {
    "pndm": PNDMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
# scheduler_config.json of Stable Diffusion v1.4 and of BK-SDM
SD_V1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SPACINGS = [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]
# Measured over every case of this file: 1.4e-6 at most (DDIM, v_prediction, trailing, 99 steps).
TOLERANCE = 1e-5

# diffusers itself calls np.array on a torch tensor, which numpy 2 deprecates for torch's __array__
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

rng = np.random.default_rng(0)
NOISE, CLEAN = rng.standard_normal((2, 2, 4, 3, 3))
WEIGHT = 0.7 * rng.standard_normal(NOISE.shape)


def ours(schedule: Schedule) -> np.ndarray:
    """The loop of the module's docstring."""
    x = schedule.initial[0] * CLEAN + schedule.initial[1] * NOISE
    history: list[np.ndarray] = []
    for n, timestep in enumerate(schedule.timesteps):
        model_input = schedule.input_scale[n] * x
        output = np.tanh(model_input * WEIGHT + timestep / 1000 - 0.5) + 0.3 * model_input
        history.append(schedule.keep[n, 0] * x + schedule.keep[n, 1] * output)
        x = schedule.a[n] * x + sum(b * h for b, h in zip(schedule.b[n], reversed(history), strict=False))
    return x


def theirs(scheduler: Any, steps: int, strength: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and result of diffusers, driven as its text-to-image and image-to-image pipelines do."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    noise, clean, weight = (torch.from_numpy(array) for array in (NOISE, CLEAN, WEIGHT))
    if strength is None:
        x = noise * scheduler.init_noise_sigma
    else:  # StableDiffusionImg2ImgPipeline.get_timesteps and prepare_latents
        first = max(steps - min(int(steps * strength), steps), 0)
        timesteps = timesteps[first * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first * scheduler.order)
        x = scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(clean)))
    for timestep in timesteps:
        model_input = scheduler.scale_model_input(x, timestep)
        output = torch.tanh(model_input * weight + (float(timestep) / 1000 - 0.5)) + 0.3 * model_input
        x = scheduler.step(output, timestep, x).prev_sample
    return timesteps.numpy(), x.numpy()


def assert_equals_diffusers(
    config: dict[str, Any], sampler: str, steps: int, strength: float | None = None, tolerance: float = TOLERANCE
) -> None:
    timesteps, expected = theirs(CLASSES[sampler].from_config(config), steps, strength)
    schedule = make_schedule(config, steps=steps, sampler=sampler, strength=strength)
    np.testing.assert_array_equal(schedule.timesteps, timesteps)
    result = ours(schedule)
    assert result.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result / scale, expected / scale, rtol=0, atol=tolerance, err_msg=f"{steps} steps")


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_count_equals_diffusers(sampler: str, prediction: str, spacing: str, offset: int) -> None:
    config = SD_V1 | {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": offset}
    for steps in range(1, 101):
        assert_equals_diffusers(config, sampler, steps)


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_equals_diffusers(sampler: str, prediction: str, spacing: str, offset: int) -> None:
    config = SD_V1 | {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": offset}
    strengths = [1.0, 0.99, 0.8, 0.75, 0.5, 0.29, 0.1]
    for steps, strength in itertools.product([1, 2, 3, 4, 5, 10, 20, 25, 49, 61, 100], strengths):
        if int(steps * strength) > 0:
            assert_equals_diffusers(config, sampler, steps, strength)


def test_pndm_at_25_steps_is_26_evaluations() -> None:
    timesteps = make_schedule(SD_V1, steps=25).timesteps
    assert len(timesteps) == 26
    assert timesteps[:4].tolist() == [961, 921, 921, 881]
    assert timesteps[-1] == 1


SOME_STEPS = [1, 2, 3, 4, 5, 7, 10, 14, 15, 16, 25, 50, 61, 99, 100]


@pytest.mark.parametrize(
    "changes",
    [
        {"set_alpha_to_one": True},
        {"beta_schedule": "linear"},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"trained_betas": np.geomspace(1e-4, 0.02, 1000).tolist()},
        {"num_train_timesteps": 200},
        {"num_train_timesteps": 777},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"lower_order_final": False},
        {"lambda_min_clipped": -2.0},
        {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"},
        {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"},
        {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"},
        {"timestep_spacing": "trailing", "set_alpha_to_one": True, "prediction_type": "v_prediction"},
    ],
    ids=lambda changes: " ".join(f"{name}={str(value)[:12]}" for name, value in changes.items()),
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_setting_equals_diffusers(sampler: str, changes: dict[str, Any]) -> None:
    for steps in SOME_STEPS:
        assert_equals_diffusers(SD_V1 | changes, sampler, steps)
        assert_equals_diffusers(SD_V1 | changes, sampler, steps, strength=1.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cosine_betas_equal_diffusers(sampler: str) -> None:
    for steps in SOME_STEPS:
        config = SD_V1 | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "steps_offset": 0}
        assert_equals_diffusers(config, sampler, steps)


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}),
        (DDIMScheduler, {"clip_sample": False, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
        (EulerAncestralDiscreteScheduler, {"steps_offset": 1, "timestep_spacing": "leading"}),
        (HeunDiscreteScheduler, {}),
        (LMSDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"euler_at_final": True}),
        (DEISMultistepScheduler, {}),
        (UniPCMultistepScheduler, {}),
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_schedulers_config_means_what_from_config_makes_of_it(
    sampler: str, source: Any, settings: dict[str, Any]
) -> None:
    accepted: dict[str, Any] = {
        "skip_prk_steps": True,
        "clip_sample": False,
    }  # PNDM's and DDIM's own defaults are refused
    if source is DEISMultistepScheduler:
        accepted["algorithm_type"] = "dpmsolver++"  # diffusers too fails on its "deis" with zero final sigma
    config = json.loads(source(**settings).to_json_string()) | accepted
    for steps in (1, 2, 5, 14, 15, 25, 50):
        assert_equals_diffusers(config, sampler, steps)


def test_a_setting_that_the_config_marks_as_default_is_the_samplers_own_default() -> None:
    loaded: Any = PNDMScheduler.from_config(
        SD_V1
    )  # no timestep_spacing in the file: "leading" to PNDM, "linspace" to Euler
    assert "timestep_spacing" in loaded.config["_use_default_values"]
    for steps in (5, 20):
        assert_equals_diffusers(dict(loaded.config), "euler", steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_setting_of_every_compatible_scheduler_is_known(sampler: str) -> None:
    compatible: list[Any] = [c for c in DDIMScheduler._get_compatibles() if hasattr(c, "_get_init_keys")]
    names = {name for scheduler in compatible for name in scheduler._get_init_keys(scheduler)} - {"self"}
    assert len(names) > 30
    own = CLASSES[sampler]._get_init_keys(CLASSES[sampler])
    read_settings(SD_V1 | dict.fromkeys(names - own - SD_V1.keys(), "of another class"), sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_unknown_setting_is_refused_by_name(sampler: str) -> None:
    with pytest.raises(ScheduleError, match=r"'shift' \(here 3.0\)"):
        make_schedule(SD_V1 | {"shift": 3.0}, steps=25, sampler=sampler)


@pytest.mark.parametrize(
    ("sampler", "name", "value"),
    [
        ("pndm", "skip_prk_steps", False),
        ("ddim", "clip_sample", True),
        ("ddim", "thresholding", True),
        ("ddim", "rescale_betas_zero_snr", True),
        ("euler", "use_karras_sigmas", True),
        ("euler", "use_exponential_sigmas", True),
        ("euler", "use_beta_sigmas", True),
        ("euler", "rescale_betas_zero_snr", True),
        ("euler", "interpolation_type", "log_linear"),
        ("euler", "timestep_type", "continuous"),
        ("dpmsolver++", "use_karras_sigmas", True),
        ("dpmsolver++", "use_lu_lambdas", True),
        ("dpmsolver++", "use_flow_sigmas", True),
        ("dpmsolver++", "thresholding", True),
        ("dpmsolver++", "solver_order", 3),
        ("dpmsolver++", "solver_type", "heun"),
        ("dpmsolver++", "algorithm_type", "sde-dpmsolver++"),
        ("dpmsolver++", "variance_type", "learned_range"),
        ("dpmsolver++", "use_dynamic_shifting", True),
        ("pndm", "prediction_type", "sample"),
        ("ddim", "prediction_type", "flow_prediction"),
        ("euler", "timestep_spacing", "middle"),
        ("euler", "final_sigmas_type", "last"),
        ("ddim", "beta_schedule", "sigmoid"),
        ("pndm", "steps_offset", 1.5),
        ("pndm", "steps_offset", -1),
        ("pndm", "num_train_timesteps", 0),
        ("pndm", "num_train_timesteps", "1000"),
        ("ddim", "set_alpha_to_one", 1),
        ("dpmsolver++", "lambda_min_clipped", "-inf"),
        ("pndm", "beta_start", -0.1),
        ("pndm", "beta_end", 1.0),
        ("pndm", "beta_end", float("nan")),
        ("pndm", "beta_start", None),
        ("euler", "trained_betas", [0.1, 0.2]),
        ("euler", "trained_betas", ["a"] * 1000),
        ("euler", "trained_betas", 0.1),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(sampler: str, name: str, value: object) -> None:
    with pytest.raises(ScheduleError, match=f"'{name}'"):
        make_schedule(SD_V1 | {name: value}, steps=25, sampler=sampler)


@pytest.mark.parametrize(
    ("sampler", "name", "value"), [("ddim", "use_karras_sigmas", True), ("pndm", "clip_sample", True)]
)
def test_a_setting_of_another_class_is_ignored_as_from_config_does(sampler: str, name: str, value: object) -> None:
    assert_equals_diffusers(SD_V1 | {name: value}, sampler, 10)


def test_ddims_own_clipping_default_is_refused() -> None:
    config = {name: value for name, value in SD_V1.items() if name != "clip_sample"}
    theirs_own: Any = DDIMScheduler.from_config(config)
    assert theirs_own.config["clip_sample"] is True
    with pytest.raises(ScheduleError, match="'clip_sample' defaults to True"):
        make_schedule(config, steps=25, sampler="ddim")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None])
def test_a_step_count_out_of_range_is_refused_naming_the_range(sampler: str, steps: Any) -> None:
    with pytest.raises(ScheduleError, match="choose 1 to 1000"):
        make_schedule(SD_V1, steps=steps, sampler=sampler)


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_an_offset_past_the_training_steps_is_refused_as_diffusers_does(sampler: str) -> None:
    config = SD_V1 | {"steps_offset": 1}  # 1000 leading steps: 0..999, plus 1
    with pytest.raises(IndexError):
        theirs(CLASSES[sampler].from_config(config), 1000)
    with pytest.raises(StepsError, match=r"1000 \w+ steps from the offset 1 start beyond .*: choose 1 to 999$"):
        make_schedule(config, steps=1000, sampler=sampler)
    make_schedule(config, steps=999, sampler=sampler)


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_an_offset_past_the_training_steps_names_steps_that_do_work(sampler: str) -> None:
    config = SD_V1 | {"steps_offset": 100}
    with pytest.raises(StepsError, match="choose 9") as caught:
        make_schedule(config, steps=950, sampler=sampler)
    nearest = int(str(caught.value).rsplit(" ", 1)[1])
    make_schedule(config, steps=nearest, sampler=sampler)
    with pytest.raises(StepsError):
        make_schedule(config, steps=nearest + 1, sampler=sampler)
    with pytest.raises(ScheduleError, match="'steps_offset' 1000 is past the 1000 timesteps"):
        make_schedule(SD_V1 | {"steps_offset": 1000}, steps=10, sampler=sampler)


@pytest.mark.parametrize("source", [UniPCMultistepScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_a_config_that_pndm_cannot_use_names_samplers_that_can(source: Any) -> None:
    config = dict(source(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config)
    assert "skip_prk_steps" not in config
    assert PNDMScheduler.from_config(config).config["skip_prk_steps"] is False  # the Runge-Kutta warm-up would run
    with pytest.raises(
        ScheduleError, match=r"'skip_prk_steps' defaults to False: .*; the sampler (.*) can be used$"
    ) as e:
        make_schedule(config, steps=10)
    named = str(e.value).rsplit("; the sampler ", 1)[1].removesuffix(" can be used").split(" or ")
    assert "euler" in named
    for sampler in named:
        assert_equals_diffusers(config, sampler, 10)
    assert not isinstance(e.value, StepsError)


def test_a_repeated_noise_level_is_refused() -> None:
    config = SD_V1 | {"timestep_spacing": "leading", "steps_offset": 1000}  # every step clamps to the last level
    with pytest.raises(ScheduleError, match="repeat a noise level"):
        make_schedule(config, steps=10, sampler="dpmsolver++")


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ScheduleError, match="choose more than 0, at most 1"):
        make_schedule(SD_V1, steps=25, strength=strength)


def test_a_strength_that_leaves_no_step_is_refused_naming_the_least_that_does() -> None:
    with pytest.raises(ScheduleError, match=r"choose at least 0\.04"):
        make_schedule(SD_V1, steps=25, strength=0.03)
    assert len(make_schedule(SD_V1, steps=25, sampler="ddim", strength=0.04).timesteps) == 1


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    with pytest.raises(ScheduleError, match="choose one of pndm, ddim, euler, dpmsolver"):
        make_schedule(SD_V1, steps=25, sampler="heun")
