"""Optimizers of one's own: `Signum`, any class of torch.optim's kind, and `lars`, a transform of each expert's matrix.

[optimizer]
name = "examples.optimizer:lars"
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from titan_moe.optimizer.build import optimizer_of
from titan_moe.optimizer.transform import State, Tick, Transform, momentum


class Signum(Optimizer):
    """Steps by the sign of the momentum, with decoupled decay (Bernstein et al., 2018, algorithm 2)."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        beta1: float = 0.9,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum" not in state:  # not `if not state`: rates by load keep entries of their own there
                    state["momentum"] = torch.zeros_like(p)
                direction = state["momentum"].lerp_(p.grad, 1 - group["beta1"]).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])


def trust_ratio(*, beta1: float = 0.9, smallest_norm: float = 1e-3) -> Transform:
    """Momentum as long as the matrix that it moves (You et al., 2017); a smaller matrix counts as `smallest_norm`."""
    average = momentum(beta1)

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        mean = average.update(gradient, state, tick)  # (R, M, N), R experts
        length = torch.linalg.matrix_norm(tick.weight(), keepdim=True).clamp(min=smallest_norm)  # (R, 1, 1)
        return mean * (length / torch.linalg.matrix_norm(mean, keepdim=True).clamp(min=1e-12))

    return Transform(average.init, update)


lars = optimizer_of(trust_ratio, "lars")
