"""An optimizer of one's own, `[optimizer] name = "examples.optimizer:Lion"`: any class of torch.optim's kind."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Steps by the sign of an interpolated momentum, with decoupled decay (Chen et al., 2023, algorithm 2)."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum" not in state:  # not `if not state`: rates by load keep entries of their own there
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                direction = momentum.lerp(p.grad, 1 - group["beta1"]).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - group["beta2"])
