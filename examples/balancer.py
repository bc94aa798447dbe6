"""Balancers of one's own, `[balancer."examples.balancer:importance"]`: by a loss, by the bias, and with a state."""

import torch
from torch import Tensor

from titan_moe.balancer import Balancer, State, keep_bias, no_loss
from titan_moe.model.routing import Routing


def importance(coeff: float = 0.1) -> Balancer:
    """Squared coefficient of variation of the experts' mean probabilities (Shazeer et al., 2017, equation 7)."""

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        mean_E = routing.scores.mean(0)
        share = routing.scores.shape[0] / num_tokens  # of this micro-batch in the step, so that all of them add up
        return coeff * share * mean_E.var(correction=0) / mean_E.mean().square()

    return Balancer(loss, keep_bias)


def tolerant(rate: float = 0.001, tolerance: float = 0.1) -> Balancer:
    """Move the bias by `rate` as `loss_free` does, but only of experts further than `tolerance` from the mean load."""

    def post_step(load: Tensor, expert_bias: Tensor) -> Tensor:
        excess = load / load.sum(-1, keepdim=True) * load.shape[-1] - 1  # (L, E): 0 at the mean load
        return expert_bias - rate * torch.sign(excess) * (excess.abs() > tolerance)

    return Balancer(no_loss, post_step)


def smebu(rate: float = 0.001, kappa: float = 1.0, momentum: float = 0.9) -> Balancer:
    """Soft-clamped momentum bias updates: b += rate * m, of m a running mean of tanh(kappa * missing load), centred.

    Source: Arcee's Trinity Large report (2026), arXiv 2602.17004, SMEBU.
    """

    def init(num_experts: int) -> State:
        return {"mean": torch.zeros(num_experts)}

    def post_step(load: Tensor, expert_bias: Tensor, state: State) -> tuple[Tensor, State]:
        missing = 1 - load / load.sum(-1, keepdim=True) * load.shape[-1]  # (L, E): of the mean load, 0 there
        push = torch.tanh(kappa * missing)
        mean = torch.lerp(push - push.mean(-1, keepdim=True), state["mean"], momentum)
        return expert_bias + rate * mean, {"mean": mean}

    return Balancer(no_loss, post_step, init=init)
