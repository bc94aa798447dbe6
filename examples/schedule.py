"""Learning-rate schedules of one's own: `[lr_scheduler] name = "examples.schedule:inverse_sqrt"`, and one by group."""

from titan_moe.optimizer.groups import GROUP_PATTERNS
from titan_moe.optimizer.schedule import Schedule, constant


def inverse_sqrt(*, steps: int, warmup_steps: int = 300, cooldown_ratio: float = 0.1) -> Schedule:
    """Linear warmup, then sqrt(warmup_steps / step) (Vaswani et al., 2017), times a linear way down to 0 at the end."""
    cooldown = max(1, round(cooldown_ratio * steps))
    warmup = max(1, warmup_steps)

    def factor(step: int) -> float:
        return min(step / warmup, (warmup / step) ** 0.5) * min(1.0, (steps - step) / cooldown)

    return factor


def slow_experts(*, steps: int, warmup_steps: int = 300, expert_warmup_steps: int = 1000) -> Schedule:
    """Constant after a linear warmup, which is longer for experts: a factor for each parameter group, by its name."""
    expert, rest = (constant(steps=steps, warmup_steps=warmup) for warmup in (expert_warmup_steps, warmup_steps))
    return lambda step: {**dict.fromkeys(GROUP_PATTERNS, rest(step)), "expert": expert(step)}
