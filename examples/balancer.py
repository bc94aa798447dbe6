"""Balancers of one's own, `[balancer."examples.balancer:importance"]`: one by a loss, one by the selection bias."""

import torch
from torch import Tensor

from titan_moe.balancer import Balancer, keep_bias, no_loss
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
