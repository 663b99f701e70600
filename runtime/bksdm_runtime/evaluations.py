"""What each U-Net evaluation of a picture computes: all of it, or less where the request allows to save."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """guided: the negative prompt's half is evaluated too. full: all blocks; otherwise the outermost layer alone, on
    the deep features of the last full evaluation."""

    guided: bool
    full: bool


def plan_evaluations(
    count: int, *, guided: bool, guidance_interval: tuple[float, float] = (0.0, 1.0), cache_interval: int = 1
) -> tuple[Evaluation, ...]:
    """One entry for each of `count` evaluations; with the defaults every one is full, which is exact sampling.

    guidance_interval: shares of the evaluations between which guidance is applied (arXiv 2404.07724), counted as
    diffusers' guiders count their start and stop. cache_interval: every so many evaluations is full, the others reuse
    its deep features (DeepCache, arXiv 2312.00858, with its outermost branch). An evaluation that is guided after one
    that was not is full too: there are no features of the negative prompt to reuse.
    """
    first, end = (int(share * count) for share in guidance_interval)
    planned: list[Evaluation] = []
    for i in range(count):
        now_guided = guided and first <= i < end
        turns_guided = bool(planned) and now_guided and not planned[-1].guided
        planned.append(Evaluation(now_guided, full=i % cache_interval == 0 or turns_guided))
    return tuple(planned)
