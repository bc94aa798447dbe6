"""Balancers by a loss on what the router gave: on loads, logits, probabilities and weights.

Shapes: T tokens, E experts, K top_k, G groups of tokens (the sequences of a micro-batch, or 1).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.balancer.common import Balancer, Scope, keep_bias, share
from titan_moe.model.routing import Routing


def _token_mean(value_T: Callable[[Routing], Tensor], coeff: float, train: bool = True) -> Balancer:
    """Build a balancer from a per-token loss (T,): its share is the sum over tokens divided by `num_tokens`."""

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        return coeff * value_T(routing).sum() / num_tokens

    return Balancer(loss, keep_bias, train=train)


def aux_loss(coeff: float = 0.1, scope: Scope = "micro_batch") -> Balancer:
    """Penalise uneven load: L_B = sum_j m_j l_j, k/E at uniform load (the paper's section 2; Switch, eq. 4).

    l_j is the mean probability of expert j, m_j the fraction of tokens that were routed to j, before any were dropped
    (no gradient). `scope` says of which tokens:

    - `micro_batch`: those that one rank routes in one forward pass. Depends on how the step is cut, by definition.
    - `sequence`: those of each sequence, and L_B is the mean over sequences (DeepSeek-V3, equations 17 to 20).
    - `global_batch`: m_j of all ranks and of the step's micro-batches so far, because the first backward runs before
      the last micro-batch is routed (Megatron-core's `global_aux_loss`, a running average; Qiu et al., 2025). Without
      accumulation it is the m_j of the whole step. Costs a collective for each micro-batch.
    - `global_batch_exact`: m_j of the whole step, counted by an extra forward pass over all micro-batches before the
      first backward. Does not depend on how the step is cut.

    Megatron-core and DeepSeek-V3 multiply by E / k: 1 at uniform load.
    """

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        # m of each group of tokens. The load may be of more tokens than this micro-batch, so it is divided by its own
        # sum; times K, because a token is counted once for each of its choices.
        T, E = routing.scores.shape
        load_GE = load.view(-1, E).to(routing.scores.dtype)
        choices_per_token = routing.tokens_per_expert.sum() / T  # K
        m_GE = choices_per_token * load_GE / load_GE.sum(-1, keepdim=True)

        # The mean probability l times this micro-batch's share T / num_tokens: the T cancels, a sum is left.
        scores_GE = routing.scores.view(load_GE.shape[0], -1, E).sum(1)  # (T, E) -> (G, E)
        return coeff * (m_GE * scores_GE).sum() / num_tokens

    return Balancer(loss, keep_bias, scope=scope)


def token_z_loss(routing: Routing) -> Tensor:
    """Squared log-partition of each token's router logits, (T,) (ST-MoE, eq. 5)."""
    return routing.router_logits.logsumexp(-1).square()


def token_entropy(routing: Routing) -> Tensor:
    """Entropy of each token's routing probabilities, (T,), nats: small when routing is peaked (the paper, 3.3.1)."""
    return torch.special.entr(routing.scores).sum(-1)


def z_loss(coeff: float = 0.001) -> Balancer:
    """Keep router logits small: L_Z = mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5)."""
    return _token_mean(token_z_loss, coeff)


def entropy_loss(coeff: float = 0.01, form: Literal["token", "batch"] = "token", train: bool = True) -> Balancer:
    """Regularise the entropy of the routing probabilities, nats.

    Form `token`: mean over tokens of H(p_t), small when routing is peaked (the paper, 3.3.1). Form `batch`: minus the
    entropy of the micro-batch's mean probability, -H(mean_t p_t), -log E when experts are used evenly on average (the
    sign and default form of the paper's code); by definition it depends on the micro-batch. With `train` false the
    value is reported but not trained on, as in the paper's runs.
    """
    if form == "token":
        return _token_mean(token_entropy, coeff, train)

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        return -coeff * torch.special.entr(routing.scores.mean(0)).sum() * share(routing, num_tokens)

    return Balancer(loss, keep_bias, train=train)


def score_variance(coeff: float = 0.001) -> Balancer:
    """Tell experts apart by their weights: -mean over tokens of 1/E sum_j (s_tj - mean_t s_tj)^2 (Guo et al., 2025).

    s_tj is the weight of expert j for token t, 0 where it is not chosen: arXiv 2505.22323, L_v, there a sum over
    tokens. The mean of s_tj is over the micro-batch, on which it depends by definition. Moves the router alone.
    """

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        T, E = routing.scores.shape
        weights_TE = routing.topk_scores.new_zeros(T, E + 1)  # the last of slots without an expert
        weights_TE = weights_TE.scatter_add(1, routing.topk_experts, routing.topk_scores)[:, :E]
        return -coeff * weights_TE.var(0, correction=0).mean() * share(routing, num_tokens)

    return Balancer(loss, keep_bias)


def coupling(coeff: float = 0.001) -> Balancer:
    """Sharpen the paths from layer to layer: -mean over tokens and pairs of adjacent layers of m_t m'_t.

    m_t is the probability of all experts that the token chose in one layer, m'_t that in the next one: their product
    is the sum over all pairs of chosen experts of p p' (R_cp of arXiv 2602.14159, as descriptions of it give it).
    """

    def loss(
        routing: Routing, load: Tensor, num_tokens: Tensor | int, routings: Sequence[Routing], index: int
    ) -> Tensor:
        # The step takes the mean over layers, of which the first has none before it.
        if index == 0:
            return routing.scores.new_zeros(())
        joint_T = chosen_probability(routings[index - 1]) * chosen_probability(routing)
        return -coeff * len(routings) / (len(routings) - 1) * joint_T.sum() / num_tokens

    return Balancer(loss, keep_bias)


def chosen_probability(routing: Routing) -> Tensor:
    """The probability of all experts that a token chose, (T,)."""
    padded_TE = F.pad(routing.scores, (0, 1))  # (T, E) -> (T, E + 1): no probability for slots without an expert
    return padded_TE.gather(1, routing.topk_experts).sum(-1)
