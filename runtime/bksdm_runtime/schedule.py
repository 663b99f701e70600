"""Samplers as tables of coefficients: everything about a sampler that does not depend on the picture.

Every sampler here moves the latents x by a linear combination of x and of what it remembers of earlier model outputs,
with weights that only the noise schedule decides. One loop serves them all (n counts evaluations, newest last):

    x = initial[0] * clean + initial[1] * noise
    output = model(input_scale[n] * x, timesteps[n])
    history.append(keep[n, 0] * x + keep[n, 1] * output)
    x = a[n] * x + sum(b[n, k] * history[-1 - k])

The tables are float64; each is proven against diffusers' scheduler over step counts, spacings, prediction types and
image-to-image strengths, quirks included: PLMS evaluates its second timestep twice; `trailing` spacing of 61 steps
over 1000 gains a 62nd evaluation at timestep -1, because diffusers walks there in floating point.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.scheduler_settings import SAMPLERS, ScheduleError, Settings, StepsError, read_settings

__all__ = ["SAMPLERS", "Schedule", "ScheduleError", "StepsError", "make_schedule"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """One row per U-Net evaluation, all float64; the loop that reads it stands in the module's docstring.

    timesteps: [E], fed to the U-Net (whole numbers but for Euler with linspace spacing).
    input_scale: [E]. keep: [E, 2]. a: [E]. b: [E, K], zero where a row has fewer than K predecessors.
    initial: factors of the clean latents and of the noise; the first is 0 for text-to-image.
    """

    timesteps: Array
    input_scale: Array
    keep: Array
    a: Array
    b: Array
    initial: tuple[float, float]


def make_schedule(
    config: Mapping[str, object], *, steps: int, sampler: str = "pndm", strength: float | None = None
) -> Schedule:
    """Compute the table of a sampler.

    config: the content of a scheduler_config.json of any diffusers scheduler class; what it means to another sampler
    is what `OtherScheduler.from_config(config)` makes of it.
    strength: None for text-to-image; for image-to-image the share (0, 1] of the steps that are run, as in
    diffusers' StableDiffusionImg2ImgPipeline: at 1 all of them, still starting from the noised picture.
    Raises ScheduleError, and StepsError when other steps or another strength would do.
    """
    settings = read_settings(config, sampler)
    trained = len(settings.alphas_cumprod)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StepsError(f"{steps!r} steps: choose 1 to {trained}, the timesteps that the model was trained on")
    begin = 0 if strength is None else _first_step(steps, strength)
    tables = {"pndm": _pndm, "ddim": _ddim, "euler": _euler, "dpmsolver++": _dpmsolver}
    with np.errstate(all="ignore"):  # what does not come out finite is refused below
        try:
            schedule = tables[sampler](settings, steps, begin, strength is not None)
        except _BeyondTrainingError:
            raise _too_many(settings, sampler, steps) from None
    arrays = (schedule.timesteps, schedule.input_scale, schedule.keep, schedule.a, schedule.b, schedule.initial)
    if not all(np.all(np.isfinite(array)) for array in arrays):
        raise StepsError(
            f"{steps} {sampler} steps with {settings.timestep_spacing} spacing and offset {settings.steps_offset}"
            " repeat a noise level, which this sampler cannot: choose another number of steps"
        )
    return schedule


class _BeyondTrainingError(Exception):
    """A timestep lies past the end of alphas_cumprod."""


def _too_many(settings: Settings, sampler: str, steps: int) -> ScheduleError:
    """What to say when the offset pushes the first timestep past the end: which steps do not."""
    trained = len(settings.alphas_cumprod)
    usable = [count for count in range(1, trained + 1) if _rounded_timesteps(settings, count)[0] < trained]
    if not usable:
        return ScheduleError(
            f"scheduler setting 'steps_offset' {settings.steps_offset} is past the {trained} timesteps"
        )
    range_of_them = len(usable) == usable[-1]
    advice = f"1 to {usable[-1]}" if range_of_them else f"{min(usable, key=lambda count: abs(count - steps))}"
    return StepsError(
        f"{steps} {sampler} steps from the offset {settings.steps_offset} start beyond the {trained} timesteps that"
        f" the model was trained on: choose {advice}"
    )


def _first_step(steps: int, strength: float) -> int:
    if not 0 < strength <= 1:
        raise StepsError(f"strength {strength!r}: choose more than 0, at most 1")
    run = min(int(steps * strength), steps)
    if run == 0:
        raise StepsError(f"strength {strength} of {steps} steps leaves none to run: choose at least {1 / steps:.3g}")
    return steps - run


def _pndm(settings: Settings, steps: int, begin: int, from_image: bool) -> Schedule:
    """PLMS: linear multistep on the model's outputs. PNDM, arXiv 2202.09778, without its Runge-Kutta warm-up."""
    descending = _rounded_timesteps(settings, steps)
    timesteps = np.concatenate([descending[:2], descending[1:]])[begin:]  # the second one runs twice
    evaluations = len(timesteps)
    ratio = len(settings.alphas_cumprod) // steps
    a, b = np.zeros(evaluations), np.zeros((evaluations, 5))
    for n, timestep in enumerate(timesteps):
        # The second evaluation only corrects the first: same step again, now with the mean of both outputs.
        start, end = (timestep + ratio, timestep) if n == 1 else (timestep, timestep - ratio)
        alpha, alpha_end = _alpha(settings, int(start)), _alpha(settings, int(end), last=True)
        shrink = np.sqrt(alpha_end / alpha)
        push = (alpha - alpha_end) / (
            alpha * np.sqrt(1 - alpha_end) + np.sqrt(alpha * (1 - alpha) * alpha_end)
        )  # formula (9) of the paper
        if settings.v_prediction:
            shrink, push = shrink + push * np.sqrt(1 - alpha), push * np.sqrt(alpha)
        if n == 1:
            # It starts from the latents before the first step: x0 = (x - b[0, 0] * output0) / a[0].
            a[1] = shrink / a[0]
            b[1, :2] = push / 2, push / 2 - a[1] * b[0, 0]
        else:
            a[n] = shrink
            b[n] = push * _PLMS[min(n, 5)]
    initial = _noised(_alpha(settings, int(timesteps[0]))) if from_image else (0.0, 1.0)
    return _table(timesteps, keep=_output_only(evaluations), a=a, b=b, initial=initial)


# Adams-Bashforth weights of the outputs, newest first, by evaluation. The corrector's own output (evaluation 1) is
# left out of the history, hence the gaps.
_PLMS = {
    0: np.array([1, 0, 0, 0, 0]),
    2: np.array([3, 0, -1, 0, 0]) / 2,
    3: np.array([23, -16, 0, 5, 0]) / 12,
    4: np.array([55, -59, 37, 0, -9]) / 24,
    5: np.array([55, -59, 37, -9, 0]) / 24,
}


def _ddim(settings: Settings, steps: int, begin: int, from_image: bool) -> Schedule:
    """DDIM without noise (eta 0), arXiv 2010.02502."""
    timesteps = _rounded_timesteps(settings, steps)[begin:]
    ratio = len(settings.alphas_cumprod) // steps
    alpha = np.array([_alpha(settings, int(t)) for t in timesteps])
    alpha_end = np.array([_alpha(settings, int(t) - ratio, last=True) for t in timesteps])
    if settings.v_prediction:
        a = np.sqrt(alpha_end * alpha) + np.sqrt((1 - alpha_end) * (1 - alpha))
        b = np.sqrt((1 - alpha_end) * alpha) - np.sqrt(alpha_end * (1 - alpha))
    else:
        a = np.sqrt(alpha_end / alpha)
        b = np.sqrt(1 - alpha_end) - a * np.sqrt(1 - alpha)
    initial = _noised(alpha[0]) if from_image else (0.0, 1.0)
    return _table(timesteps, keep=_output_only(len(timesteps)), a=a, b=b[:, None], initial=initial)


def _euler(settings: Settings, steps: int, begin: int, from_image: bool) -> Schedule:
    """Euler's method in sigma = sqrt((1 - alpha) / alpha), arXiv 2206.00364; x is the unscaled latents there."""
    if settings.timestep_spacing == "linspace":  # not rounded, but float32
        timesteps = np.linspace(0, len(settings.alphas_cumprod) - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    else:
        timesteps = _rounded_timesteps(settings, steps)
    sigmas = _sigmas(settings, timesteps)
    largest = float(sigmas.max())
    sigma, sigma_end = sigmas[begin:-1], sigmas[begin + 1 :]
    if settings.v_prediction:
        a = 1 + (sigma_end - sigma) * sigma / (sigma**2 + 1)
        b = (sigma_end - sigma) / np.sqrt(sigma**2 + 1)
    else:
        a, b = np.ones_like(sigma), sigma_end - sigma
    if from_image:
        initial = (1.0, float(sigma[0]))
    else:
        initial = (0.0, largest if settings.timestep_spacing != "leading" else float(np.sqrt(largest**2 + 1)))
    return _table(
        timesteps[begin:],
        input_scale=1 / np.sqrt(sigma**2 + 1),
        keep=_output_only(len(sigma)),
        a=a,
        b=b[:, None],
        initial=initial,
    )


def _dpmsolver(settings: Settings, steps: int, begin: int, from_image: bool) -> Schedule:
    """DPM-Solver++ 2M, arXiv 2211.01095: multistep on predictions of the clean latents, midpoint form."""
    timesteps = _dpmsolver_timesteps(settings, steps)
    evaluations = len(timesteps)
    sigmas = _sigmas(settings, timesteps)  # [evaluations + 1]
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    few = settings.lower_order_final and evaluations < 15
    a, b = np.zeros(evaluations), np.zeros((evaluations, 2))
    for n in range(begin, evaluations):
        decay = sigmas[n + 1] / sigmas[n]  # exp(-h), h the step in lambda = -log(sigma)
        a[n] = decay * alphas[n + 1] / alphas[n]
        push = alphas[n + 1] * (1 - decay)
        ends = n == evaluations - 1
        if n == begin or (ends and (few or settings.euler_at_final or not settings.final_sigma_min)):
            b[n, 0] = push
        else:
            slope = np.log(decay) / np.log(sigmas[n] / sigmas[n - 1]) / 2  # h / (2 * the step before)
            b[n] = push * (1 + slope), -push * slope
    alpha, noise = alphas[:-1], (sigmas * alphas)[:-1]
    # remembered: the predicted clean latents
    keep = np.stack([alpha, -noise] if settings.v_prediction else [1 / alpha, -noise / alpha], axis=1)
    initial = (float(alpha[begin]), float(noise[begin])) if from_image else (0.0, 1.0)
    return _table(timesteps[begin:], keep=keep[begin:], a=a[begin:], b=b[begin:], initial=initial)


def _rounded_timesteps(settings: Settings, steps: int) -> Array:
    """Whole timesteps from the noisiest down, in diffusers' own arithmetic (PNDM, DDIM; Euler but for linspace)."""
    trained = len(settings.alphas_cumprod)
    if settings.timestep_spacing == "linspace":
        return np.round(np.linspace(0, trained - 1, steps))[::-1]
    if settings.timestep_spacing == "trailing":
        return np.round(np.arange(trained, 0, -(trained / steps))) - 1
    return np.arange(steps, dtype=np.float64)[::-1] * (trained // steps) + settings.steps_offset


def _dpmsolver_timesteps(settings: Settings, steps: int) -> Array:
    """Whole timesteps of DPM-Solver++, which divides the range into one step more and drops the last."""
    trained = len(settings.alphas_cumprod)
    log_snr = -np.log(_training_sigmas(settings))[::-1]  # ascending
    usable = trained - int(np.searchsorted(log_snr, settings.lambda_min_clipped))
    if settings.timestep_spacing == "linspace":
        return np.round(np.linspace(0, usable - 1, steps + 1))[:0:-1]
    if settings.timestep_spacing == "trailing":
        return np.round(np.arange(usable, 0, -(trained / steps))) - 1
    return np.arange(steps + 1, dtype=np.float64)[:0:-1] * (usable // (steps + 1)) + settings.steps_offset


def _training_sigmas(settings: Settings) -> Array:
    return np.sqrt((1 - settings.alphas_cumprod) / settings.alphas_cumprod)


def _sigmas(settings: Settings, timesteps: Array) -> Array:
    """Noise levels of the timesteps, interpolated between whole ones, and of the end: [E + 1]."""
    training = _training_sigmas(settings)
    end = training[0] if settings.final_sigma_min else 0.0
    return np.append(np.interp(timesteps, np.arange(len(training)), training), end)


def _alpha(settings: Settings, timestep: int, *, last: bool = False) -> float:
    """alphas_cumprod at a timestep. last: below 0 stands what the sampler ends at."""
    if last and timestep < 0:
        return 1.0 if settings.set_alpha_to_one else float(settings.alphas_cumprod[0])
    if timestep >= len(settings.alphas_cumprod):
        raise _BeyondTrainingError
    return float(settings.alphas_cumprod[timestep])  # -1 (trailing spacing) wraps around, as in diffusers


def _noised(alpha: float) -> tuple[float, float]:
    return float(np.sqrt(alpha)), float(np.sqrt(1 - alpha))


def _output_only(evaluations: int) -> Array:
    return np.tile([0.0, 1.0], (evaluations, 1))


def _table(
    timesteps: Array, *, keep: Array, a: Array, b: Array, initial: tuple[float, float], input_scale: Array | None = None
) -> Schedule:
    scale = np.ones(len(timesteps)) if input_scale is None else input_scale
    return Schedule(np.array(timesteps), scale, keep, a, b, initial)
