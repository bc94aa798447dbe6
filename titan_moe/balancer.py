"""Load balancing: a balancer is a pair of pure functions of a layer's routing and of its load.

Shapes: T tokens, E experts, K top_k.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titan_moe.model.routing import Routing


class Balancer(NamedTuple):
    """How a layer's load is kept even: by a loss on its routing, by a bias on its selection, or both.

    `loss(routing, load_E, num_tokens)` is this micro-batch's share of the step's loss, a scalar: a mean over the
    tokens of the micro-batch times (its tokens / `num_tokens`, the tokens of the whole step), so that the shares of
    micro-batches and ranks add up. `load_E` is the layer's tokens per expert.
    `post_step(load, expert_bias)` gives the bias after an optimizer step; both are (..., E), the load is global.
    """

    loss: Callable[[Routing, Tensor, Tensor | int], Tensor]
    post_step: Callable[[Tensor, Tensor], Tensor]


def keep_bias(load: Tensor, expert_bias: Tensor) -> Tensor:
    """Post step of a balancer that has no bias."""
    return expert_bias


def no_loss(routing: Routing, load_E: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Loss of a balancer that has none; the step skips it."""
    return routing.router_logits.new_zeros(())


def _token_mean(value_T: Callable[[Routing], Tensor], coeff: float) -> Balancer:
    """Build a balancer from a per-token loss (T,): its share is the sum over tokens divided by `num_tokens`."""

    def loss(routing: Routing, load_E: Tensor, num_tokens: Tensor | int) -> Tensor:
        return coeff * value_T(routing).sum() / num_tokens

    return Balancer(loss, keep_bias)


def aux_loss(coeff: float = 0.1, scope: Literal["micro_batch"] = "micro_batch") -> Balancer:
    """Penalise uneven load: L_B = sum_j m_j l_j, k/E at uniform load (the paper's section 2; Switch, eq. 4).

    m_j is the fraction of tokens routed to expert j (no gradient), l_j the mean probability of j. With scope
    `micro_batch` both are of the tokens that one rank routes in one forward pass.
    """

    def loss(routing: Routing, load_E: Tensor, num_tokens: Tensor | int) -> Tensor:
        T = routing.scores.shape[0]
        m_E = routing.tokens_per_expert.to(routing.scores.dtype) / T
        # mean probability l_E times the share T / num_tokens of this micro-batch: the T cancels
        return coeff * (m_E * routing.scores.sum(0)).sum() / num_tokens

    return Balancer(loss, keep_bias)


def token_z_loss(routing: Routing) -> Tensor:
    """Squared log-partition of each token's router logits, (T,) (ST-MoE, eq. 5)."""
    return routing.router_logits.logsumexp(-1).square()


def token_entropy(routing: Routing) -> Tensor:
    """Entropy of each token's routing probabilities, (T,), nats: small when routing is peaked (the paper, 3.3.1)."""
    return torch.special.entr(routing.scores).sum(-1)


def z_loss(coeff: float = 0.001) -> Balancer:
    """Keep router logits small: L_Z = mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5)."""
    return _token_mean(token_z_loss, coeff)


def entropy_loss(coeff: float = 0.01) -> Balancer:
    """Encourage peaked routing: mean over tokens of the entropy of the routing probabilities (the paper, 3.3.1)."""
    return _token_mean(token_entropy, coeff)


def loss_free(rate: float = 0.001, rule: Literal["sign"] = "sign") -> Balancer:
    """Move each expert's selection bias by `rate` towards even load, without a loss (Wang et al. 2024, algorithm 1).

    Rule `sign`: b_i += rate * sign(mean load - load_i), once per optimizer step, from global loads.
    """

    def post_step(load: Tensor, expert_bias: Tensor) -> Tensor:
        load = load.to(expert_bias.dtype)
        return expert_bias + rate * torch.sign(load.mean(-1, keepdim=True) - load)

    return Balancer(no_loss, post_step)


BALANCERS: dict[str, Callable[..., Balancer]] = {
    "aux_loss": aux_loss,
    "z_loss": z_loss,
    "entropy_loss": entropy_loss,
    "loss_free": loss_free,
}
