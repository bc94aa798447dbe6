"""AdEMAMix: AdamW with a second, slow average of the gradient (Pagliardini et al., 2024, arXiv 2409.03137).

Equal to the authors' code. At step t from 1, with T the warm-up's steps:

    m1 <- beta1 m1 + (1 - beta1) g          m2 <- b3 m2 + (1 - b3) g          v <- beta2 v + (1 - beta2) g^2
    u = (m1 / (1 - beta1^t) + a m2) / (sqrt(v / (1 - beta2^t)) + eps)
    W <- W - lr (u + weight_decay W)

a grows in proportion to t to alpha. b3 grows to beta3 from beta1, so that its half-life does in proportion to t.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from titan_moe.optimizer.kernels import elementwise
from titan_moe.optimizer.transform import Transform


def ademamix(
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    alpha: float = 8.0,
    alpha_warmup: int = 0,
    beta3_warmup: int = 0,
    eps: float = 1e-8,
) -> Transform:
    """AdEMAMix, AdamW that also remembers old gradients: alpha times a slow average (Pagliardini et al., 2024).

    The average of decay `beta3` is not bias-corrected. `alpha` and `beta3` grow to their values over `alpha_warmup`
    and `beta3_warmup` steps (0: they have them at once); the authors take all steps of the run for both, and early
    steps may diverge without. The state is one and a half times AdamW's.
    """

    def direction(
        gradients: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]
    ) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
        # of each tensor's own step; in double precision, for beta3 is so near one that fp32 would round what it leaves
        t = torch.stack(steps).double()
        scale = alpha * (t / alpha_warmup).clamp(max=1) if alpha_warmup else torch.full_like(t, alpha)
        gain = 1 - warmed(beta1, beta3, t, beta3_warmup)
        scales, gains, fast_corrections, square_corrections = (
            list(values.float().unbind()) for values in (scale, gain, 1 - beta1**t, (1 - beta2**t).sqrt())
        )

        fasts, slows, squares = states
        fasts = torch._foreach_lerp(fasts, gradients, 1 - beta1)
        slows = torch._foreach_lerp(slows, gradients, gains)
        squares = torch._foreach_mul(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)

        # each in place of the one before, so that temporaries are two at most
        directions = torch._foreach_mul(slows, scales)
        torch._foreach_add_(directions, torch._foreach_div(fasts, fast_corrections))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, square_corrections)
        torch._foreach_add_(roots, eps)
        torch._foreach_div_(directions, roots)
        return directions, [fasts, slows, squares]

    return elementwise(("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"), direction)


TINY = 1e-8  # the authors', in the logarithm, for a beta of 0


def warmed(start: float, end: float, t: Tensor, steps: int) -> Tensor:
    """The decay at step t, float64, that goes from `start` to `end` so that its half-life grows evenly over `steps`."""
    if not steps:
        return torch.full_like(t, end)
    first, last = (math.log(0.5) / math.log(beta + TINY) - 1 for beta in (start, end))
    half_life = first + (t / steps) * (last - first)
    return torch.where(t < steps, 0.5 ** (1 / (half_life + 1)), end)
