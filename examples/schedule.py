"""A learning-rate schedule of one's own: `[lr_scheduler] name = "examples.schedule:inverse_sqrt"`."""

from titan_moe.optimizer.schedule import Schedule


def inverse_sqrt(*, steps: int, warmup_steps: int = 300, cooldown_ratio: float = 0.1) -> Schedule:
    """Linear warmup, then sqrt(warmup_steps / step) (Vaswani et al., 2017), times a linear way down to 0 at the end."""
    cooldown = max(1, round(cooldown_ratio * steps))
    warmup = max(1, warmup_steps)

    def factor(step: int) -> float:
        return min(step / warmup, (warmup / step) ** 0.5) * min(1.0, (steps - step) / cooldown)

    return factor
