"""Routers: pure functions from router logits to the experts of every token.

A router is built from its arguments, `ROUTERS[name](**arguments)`, and then maps (router_logits_TE, expert_bias_E or
None) to a `Routing`. All of its math is fp32. `expert_bias` takes part in the choice of experts only: the weights that
combine the experts' outputs never see it.

Shapes: T tokens, E experts, K top_k.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided for T tokens. Everything about balance is a function of it."""

    router_logits: Tensor  # (T, E) fp32, before temperature, noise and bias
    scores: Tensor  # (T, E) fp32, sums to 1 over experts: the probabilities that balance losses use
    topk_scores: Tensor  # (T, K) fp32, the weights that combine the experts' outputs
    topk_experts: Tensor  # (T, K) int64
    tokens_per_expert: Tensor  # (E,) int64, sums to T * K
    selection: Tensor | None = None  # (T, E) fp32, what the choice compared before the bias; no gradient


Router = Callable[[Tensor, Tensor | None], Routing]


def topk_softmax(*, top_k: int, temperature: float = 1.0) -> Router:
    """Choose the top_k largest logits, then a softmax over these alone: the weights of a token sum to 1.

    z = logits / temperature; experts = topk(z + bias); weights = softmax(z[experts]); scores = softmax(z).
    Source: Tandogan et al., section 3.3, the scheme of the paper's experiments; equal to Mixtral's softmax, top-k,
    renormalise (Jiang et al., 2024). The bias is added to the logits, as in the paper's section 3.3.3.
    Raises ValueError when top_k < 1 or temperature <= 0, and when it is called with fewer than top_k experts.
    """
    _check(top_k, temperature)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        z_TE = logits_TE / temperature
        topk_experts_TK = _select(z_TE, expert_bias_E, top_k)
        topk_scores_TK = z_TE.gather(-1, topk_experts_TK).softmax(-1)
        return _routing(logits_TE, z_TE.softmax(-1), topk_scores_TK, topk_experts_TK, z_TE)

    return route


def softmax_topk(*, top_k: int, temperature: float = 1.0) -> Router:
    """Softmax over all experts, of which the top_k largest are kept as they are: the weights sum to less than 1.

    z = logits / temperature; experts = topk(z + bias); weights = softmax(z)[experts]; scores = softmax(z).
    Source: Tandogan et al., section 3.3; Switch (Fedus et al., 2021) for top_k = 1; Qwen2-MoE with norm_topk_prob
    off. Raises ValueError when top_k < 1 or temperature <= 0, and when it is called with fewer than top_k experts.
    """
    _check(top_k, temperature)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        z_TE = logits_TE / temperature
        topk_experts_TK = _select(z_TE, expert_bias_E, top_k)
        scores_TE = z_TE.softmax(-1)
        return _routing(logits_TE, scores_TE, scores_TE.gather(-1, topk_experts_TK), topk_experts_TK, z_TE)

    return route


def sigmoid(*, top_k: int, temperature: float = 1.0, norm_topk: bool = True, score_scale: float = 1.0) -> Router:
    """Score every expert by its own sigmoid and keep the top_k largest.

    s = sigmoid(logits / temperature); experts = topk(s + bias); weights = score_scale * s[experts], divided by their
    sum + 1e-20 when `norm_topk`; scores = s / (sum of s over experts + 1e-20). Source: DeepSeek-V3 (2024), equations
    13 to 16, bias of Wang et al. (2024); Glm4Moe with norm_topk_prob and routed_scaling_factor.
    Raises ValueError when top_k < 1 or temperature <= 0, and when it is called with fewer than top_k experts.
    """
    _check(top_k, temperature)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        s_TE = (logits_TE / temperature).sigmoid()
        topk_experts_TK = _select(s_TE, expert_bias_E, top_k)
        topk_scores_TK = s_TE.gather(-1, topk_experts_TK)
        if norm_topk:
            topk_scores_TK = topk_scores_TK / (topk_scores_TK.sum(-1, keepdim=True) + 1e-20)
        scores_TE = s_TE / (s_TE.sum(-1, keepdim=True) + 1e-20)
        return _routing(logits_TE, scores_TE, topk_scores_TK * score_scale, topk_experts_TK, s_TE)

    return route


def force_balanced(router: Router) -> Router:
    """A router that deals the experts out in turn, for measuring speed at perfect balance (a debugging aid).

    Choice k of token t is expert (t * K + k) mod E, whatever the logits; its weight is the given router's score there.
    """

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        routing = router(router_logits_TE, expert_bias_E)
        ids_TK = routing.topk_experts
        slots_N = torch.arange(ids_TK.numel(), device=ids_TK.device)
        dealt_TK = (slots_N % routing.scores.shape[-1]).view_as(ids_TK)
        return _routing(routing.router_logits, routing.scores, routing.scores.gather(-1, dealt_TK), dealt_TK)

    return route


def _check(top_k: int, temperature: float) -> None:
    if top_k < 1:
        raise ValueError(f"router top_k ({top_k}) must be at least 1")
    if not temperature > 0:
        raise ValueError(f"router temperature ({temperature}) must be above 0")


def _select(selection_TE: Tensor, expert_bias_E: Tensor | None, top_k: int) -> Tensor:
    """The (T, K) indices of the largest selection scores after the bias; carries no gradient."""
    num_experts = selection_TE.shape[-1]
    if top_k > num_experts:
        raise ValueError(f"router top_k ({top_k}) must be at most num_experts ({num_experts})")
    selection_TE = selection_TE.detach()
    if expert_bias_E is not None:
        selection_TE = selection_TE + expert_bias_E.float()
    return selection_TE.topk(top_k, dim=-1).indices


def _routing(
    logits_TE: Tensor,
    scores_TE: Tensor,
    topk_scores_TK: Tensor,
    topk_experts_TK: Tensor,
    selection_TE: Tensor | None = None,
) -> Routing:
    """A Routing with its counts; a scatter because bincount has a data-dependent shape."""
    ids_N = topk_experts_TK.flatten()
    counts_E = ids_N.new_zeros(logits_TE.shape[-1]).scatter_add_(0, ids_N, torch.ones_like(ids_N))
    selection_TE = None if selection_TE is None else selection_TE.detach()
    return Routing(logits_TE, scores_TE, topk_scores_TK, topk_experts_TK, counts_E, selection_TE)


ROUTERS: dict[str, Callable[..., Router]] = {
    "topk_softmax": topk_softmax,
    "softmax_topk": softmax_topk,
    "sigmoid": sigmoid,
}
