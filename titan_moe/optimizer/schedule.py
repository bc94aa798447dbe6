"""Learning-rate schedules: functions from the optimizer step (from 1) to a factor of the learning rates.

A schedule gives one factor for all parameter groups, or a factor for each by its name.
"""

import math
from collections.abc import Callable, Iterable, Mapping

Factor = float | Mapping[str, float]
Schedule = Callable[[int], Factor]


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup_steps at step 1 to 1 at step warmup_steps."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def _progress(step: int, start: int, end: int) -> float:
    """How far a decay from step `start` to step `end` has come, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def factors_of(factor: Factor, groups: Iterable[str]) -> dict[str, float]:
    """The factor of each group; ValueError for a group that a schedule by group leaves out, or one that is unknown."""
    names = list(groups)
    if not isinstance(factor, Mapping):
        return dict.fromkeys(names, factor)
    if odd := set(names) ^ factor.keys():
        what = "gives no factor for" if odd & set(names) else "gives a factor for an unknown group"
        raise ValueError(f"lr_scheduler.name {what} {', '.join(sorted(odd))}: the groups are {', '.join(names)}")
    return {name: factor[name] for name in names}


def cosine(*, steps: int, warmup_steps: int = 300, min_lr_factor: float = 0.1) -> Callable[[int], float]:
    """Linear warmup, then half a cosine down to `min_lr_factor` at the last step (the paper, Table 1)."""

    def factor(step: int) -> float:
        half_cosine = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup_steps, steps)))
        return _warmup(step, warmup_steps) * (min_lr_factor + (1 - min_lr_factor) * half_cosine)

    return factor


def wsd(
    *, steps: int, warmup_steps: int = 300, min_lr_factor: float = 0.0, decay_ratio: float = 0.2
) -> Callable[[int], float]:
    """Warmup, stable, then linear decay over the last `decay_ratio` of the steps (MiniCPM, arXiv 2404.06395)."""

    def factor(step: int) -> float:
        start = max(warmup_steps, steps - round(decay_ratio * steps))
        return _warmup(step, warmup_steps) * (1 - (1 - min_lr_factor) * _progress(step, start, steps))

    return factor


def linear(*, steps: int, warmup_steps: int = 300, min_lr_factor: float = 0.0) -> Callable[[int], float]:
    """Linear warmup, then linear decay to `min_lr_factor` at the last step."""
    return wsd(steps=steps, warmup_steps=warmup_steps, min_lr_factor=min_lr_factor, decay_ratio=1.0)


def multi_step(
    *, steps: int, warmup_steps: int = 300, milestones: tuple[float, ...] = (0.8, 0.9), factor: float = 0.316
) -> Callable[[int], float]:
    """Linear warmup, then the full learning rate, times `factor` from each of `milestones` on, shares of the steps.

    Source: DeepSeek LLM (2024, arXiv 2401.02954), 2.3, and DeepSeekMoE (arXiv 2401.06066), 5.1. ValueError for shares
    that do not rise from 0 to 1.
    """
    if [*milestones] != sorted({*milestones}) or not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"lr_scheduler.milestones ({list(milestones)}) must rise, and lie between 0 and 1")

    # A step beyond a milestone is the first with the lower rate.
    ends = [round(milestone * steps) for milestone in milestones]
    return lambda step: _warmup(step, warmup_steps) * factor ** sum(step > end for end in ends)


def constant(*, steps: int, warmup_steps: int = 300) -> Callable[[int], float]:
    """Linear warmup, then the full learning rate to the end."""
    return lambda step: _warmup(step, warmup_steps)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "multi_step": multi_step,
    "constant": constant,
}
