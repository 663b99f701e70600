"""What a diffusers scheduler_config.json means to each sampler.

The rule is diffusers': asking for another sampler than the one that the file names means
`OtherScheduler.from_config(config)`. The other class takes the settings that it knows, takes its own defaults for
those that the file leaves out, and ignores those that belong to other classes. Beyond that rule, a setting that no
class knows, or whose value asks for arithmetic that the coefficient tables cannot express, is refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

SAMPLERS = ("pndm", "ddim", "euler", "dpmsolver++")


class ScheduleError(ValueError):
    """A sampler, step count, strength or scheduler setting that cannot be used; the message says which and why."""


class StepsError(ScheduleError):
    """The number of steps or the strength that was asked for cannot be used; the message says what can."""


@dataclass(frozen=True)
class Settings:
    """The settings of one sampler, checked.

    alphas_cumprod: [num_train_timesteps] float64 holding float32 values, strictly between 0 and 1: diffusers (and so
    the training of every published model) computes them in float32, and they are this model's definition.
    """

    alphas_cumprod: NDArray[np.float64]
    v_prediction: bool
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool = False  # PNDM and DDIM: the step after the last ends at alpha 1, not at alphas_cumprod[0]
    final_sigma_min: bool = False  # Euler and DPM-Solver++: end at the smallest training sigma, not at 0
    lower_order_final: bool = True  # DPM-Solver++: first order at the last of fewer than 15 steps
    euler_at_final: bool = False  # DPM-Solver++: first order at the last step
    lambda_min_clipped: float = -math.inf  # DPM-Solver++: skip the timesteps whose log SNR is below


_SCHEDULE: dict[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_SIGMAS: dict[str, object] = {
    "timestep_spacing": "linspace",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "rescale_betas_zero_snr": False,
}
# The __init__ defaults of the diffusers classes
_DEFAULTS: dict[str, dict[str, object]] = {
    "pndm": _SCHEDULE | {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "ddim": _SCHEDULE
    | {
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
        "clip_sample": True,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    },
    "euler": _SCHEDULE | _SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "dpmsolver++": _SCHEDULE
    | _SIGMAS
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "lambda_min_clipped": -math.inf,
        "thresholding": False,
        "variance_type": None,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
    },
}
# Settings with one supported meaning. The second and later values are those that diffusers' class reads as the first.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "skip_prk_steps": (True,),  # the Runge-Kutta warm-up evaluates the model between the rows of a table
    "clip_sample": (False,),  # clipping is not linear in the sample
    "thresholding": (False,),  # nor is dynamic thresholding
    "rescale_betas_zero_snr": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "variance_type": (None,),  # a learned variance doubles the model's output channels
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
# Read by no sampler here: parameters of other diffusers classes, or of modes that _SUPPORTED refuses.
_IGNORED = frozenset(
    [
        *("clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio", "flow_shift", "predict_x0", "rho"),
        *("sample_max_value", "shift_terminal", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule", "solver_p"),
        "time_shift_type",
    ]
).union(*_DEFAULTS.values())


def read_settings(config: Mapping[str, object], sampler: str) -> Settings:
    """Read the settings of a sampler from the content of a scheduler_config.json.

    Raises ScheduleError, which names the samplers that can use the file when this one cannot.
    """
    if sampler not in _DEFAULTS:
        raise ScheduleError(f"there is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    try:
        return _read(config, sampler)
    except ScheduleError as error:
        others = [other for other in SAMPLERS if other != sampler and _can_read(config, other)]
        if not others:
            raise
        raise ScheduleError(f"{error}; the sampler {' or '.join(others)} can be used") from None


def _can_read(config: Mapping[str, object], sampler: str) -> bool:
    try:
        _read(config, sampler)
    except ScheduleError:
        return False
    return True


def _read(config: Mapping[str, object], sampler: str) -> Settings:
    values = dict(_DEFAULTS[sampler])
    left_out = config.get("_use_default_values")  # diffusers notes here the settings that were not given
    for name, value in config.items():
        if name.startswith("_") or (isinstance(left_out, list) and name in left_out):
            continue
        if name in values:
            values[name] = value
        elif name not in _IGNORED:
            raise ScheduleError(f"scheduler setting {name!r} (here {value!r}) is not one that any sampler here knows")
    for name, allowed in _SUPPORTED.items():
        if name in values and not any(values[name] is choice or values[name] == choice for choice in allowed):
            said = "is" if name in config else "defaults to"
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ScheduleError(f"scheduler setting {name!r} {said} {values[name]!r}: {sampler} here needs {choices}")
    return Settings(
        alphas_cumprod=_alphas_cumprod(values),
        v_prediction=values["prediction_type"] == "v_prediction",
        timestep_spacing=str(values["timestep_spacing"]),
        steps_offset=_integer(values, "steps_offset", least=0),
        set_alpha_to_one=_boolean(values, "set_alpha_to_one"),
        final_sigma_min=values.get("final_sigmas_type") == "sigma_min",
        lower_order_final=_boolean(values, "lower_order_final"),
        euler_at_final=_boolean(values, "euler_at_final"),
        lambda_min_clipped=_number(values, "lambda_min_clipped", minus_infinity=True),
    )


def _alphas_cumprod(values: Mapping[str, object]) -> NDArray[np.float64]:
    betas = _betas(values)
    # torch.cumprod keeps its running product in float64 and rounds each element to float32
    products = np.cumprod(np.subtract(1, betas).astype(np.float64)).astype(np.float32).astype(np.float64)
    if not np.all((products > 0) & (products < 1)):
        raise ScheduleError("the scheduler's betas must lie between 0 and 1, and their products must not vanish")
    return products


def _betas(values: Mapping[str, object]) -> NDArray[np.float32]:
    size = _integer(values, "num_train_timesteps", least=1)
    trained = values["trained_betas"]
    if trained is not None:
        if not isinstance(trained, (list, tuple)):
            raise ScheduleError(f"scheduler setting 'trained_betas' is {trained!r}: it needs a list of numbers")
        betas = cast("Sequence[object]", trained)
        numbers = [_number({"trained_betas": beta}, "trained_betas") for beta in betas]
        if len(numbers) != size:
            raise ScheduleError(f"'trained_betas' has {len(numbers)} numbers, but 'num_train_timesteps' is {size}")
        return np.array(numbers, np.float32)
    if values["beta_schedule"] == "squaredcos_cap_v2":
        alpha_bar = [math.cos((step / size + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(size + 1)]
        return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(size)], np.float32)
    start, end = _number(values, "beta_start"), _number(values, "beta_end")
    if not (0 < start < 1 and 0 < end < 1):
        raise ScheduleError(f"'beta_start' {start} and 'beta_end' {end} must lie between 0 and 1")
    if values["beta_schedule"] == "scaled_linear":
        return np.square(_linspace(start**0.5, end**0.5, size))
    return _linspace(start, end, size)


def _linspace(start: float, end: float, size: int) -> NDArray[np.float32]:
    """torch.linspace in float32, bit for bit: from both ends towards the middle, each value rounded once."""
    first, last = float(np.float32(start)), float(np.float32(end))
    step = float(np.float32(float(np.float32(last - first)) / max(size - 1, 1)))
    index = np.arange(size)
    values = np.where(index < max(size // 2, 1), first + step * index, last - step * (size - 1 - index))
    return values.astype(np.float32)


def _integer(values: Mapping[str, object], name: str, *, least: int) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"scheduler setting {name!r} is {value!r}: it needs an integer of at least {least}")
    return value


def _boolean(values: Mapping[str, object], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise ScheduleError(f"scheduler setting {name!r} is {value!r}: it needs true or false")
    return value


def _number(values: Mapping[str, object], name: str, *, minus_infinity: bool = False) -> float:
    value = values.get(name, -math.inf)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) or (minus_infinity and value == -math.inf))
    ):
        raise ScheduleError(f"scheduler setting {name!r} is {value!r}: it needs a number")
    return float(value)
