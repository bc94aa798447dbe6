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


def rprop(rate: float = 0.001, up: float = 1.2, down: float = 0.5) -> Balancer:
    """Move the bias by a rate of each expert's own: it grows while an expert misses tokens, or has too many, in a row.

    The rule of Rprop (Riedmiller and Braun, 1993), with the error of the load in place of a gradient.
    """

    def init(num_experts: int) -> State:
        return {"rate": torch.full((num_experts,), rate), "sign": torch.zeros(num_experts)}

    def post_step(load: Tensor, expert_bias: Tensor, state: State) -> tuple[Tensor, State]:
        sign = torch.sign(load.float().mean(-1, keepdim=True) - load)  # (L, E)
        agreement = sign * state["sign"]  # 1: as the step before, -1: now on the other side, 0: even load
        factor = torch.where(agreement > 0, up, torch.where(agreement < 0, down, 1.0))
        rates = state["rate"] * factor
        return expert_bias + rates * sign, {"rate": rates, "sign": sign}

    return Balancer(no_loss, post_step, init=init)
