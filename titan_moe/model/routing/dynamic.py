"""Routers in which a token may have more or fewer experts than top_k.

What a token does not use of its slots is *unused*: id E, weight 0, `kept` false.

Shapes: T tokens, E experts, K slots of a token.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_moe.model.routing.common import Options, Router, Routing, check_top_k, make_routing, normalized, select

Rounding = Literal["nearest", "up", "down"]


def threshold(*, top_k: int, max_k: int = 0, score_scale: float = 1.0) -> Router:
    """Take every expert whose score is above its threshold: on average top_k, none to `max_k` (0: 2 * top_k) a token.

    s = sigmoid(logits); experts = those with s - beta > 0, of more than `max_k` the largest s - beta; weights =
    score_scale * s[experts]; scores = s / (sum of s over experts + 1e-20). The threshold is beta = 1/2 - bias:
    `loss_free` with rule `quantile` moves it so that each expert gets T * top_k / E tokens. Evaluation does the same.
    Source: Su (2026), kexue.fm/archives/11626, which has no `max_k` (here a tensor has as many slots) and other starts
    of beta. Raises ValueError when top_k < 1 or max_k is neither 0 nor at least top_k.
    """
    check_top_k(top_k, 1.0)
    if max_k and max_k < top_k:
        raise ValueError(
            f"router.max_k ({max_k}) must be at least moe.top_k ({top_k}), the experts of a token on average, or 0 for "
            "twice as many"
        )
    slots = max_k or 2 * top_k

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        s_TE = logits_TE.sigmoid()

        # What is above 0 fires. The bias moves that alone: the weights are of the sigmoids without it.
        margin_TE = s_TE.detach() - 0.5
        biased_TE = margin_TE if expert_bias_E is None else margin_TE + expert_bias_E.float()
        best_TK = biased_TE.topk(min(slots, s_TE.shape[-1]), dim=-1)
        weights_TK = s_TE.gather(-1, best_TK.indices) * score_scale
        return make_routing(
            logits_TE,
            normalized(s_TE),
            weights_TK,
            best_TK.indices,
            margin_TE,
            used_TK=best_TK.values > 0,
            mean_k=top_k,
        )

    return route


def token_rounding(*, top_k: int, tile: int = 128, rounding: Rounding = "nearest") -> Router:
    """Round the tokens of each expert to a multiple of `tile`, the rows that a grouped product computes together.

    p = softmax(logits); each token chooses the top_k largest logits + bias, with weights p over their sum. An expert
    that was chosen by f tokens gets r of them: f rounded to a multiple of `tile` by `rounding` (`nearest`: halves to
    the even multiple), at most all. It keeps the chosen ones of largest weight; if these are too few, it takes the
    others of largest p, which is then their weight. Weights of what a token keeps don't change. The load is what is
    computed. Rounding is of the tokens of a forward pass on one rank and looks at later ones; evaluation is the plain
    choice. Source: SonicMoE (Guo et al., 2025), its code. Raises ValueError when top_k < 1 or tile < 1.
    """
    check_top_k(top_k, 1.0)
    if tile < 1:
        raise ValueError(f"router.tile ({tile}) must be at least 1")
    options = Options(top_k, 1.0, 1, 1, 0.0, 0.0)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        p_TE = logits_TE.softmax(-1)
        chosen_TK = select(logits_TE, expert_bias_E, options)
        chosen_weights_TK = logits_TE.gather(-1, chosen_TK).softmax(-1)
        plain = make_routing(logits_TE, p_TE, chosen_weights_TK, chosen_TK, logits_TE)
        if not torch.is_grad_enabled():
            return plain

        # Each of the E columns is a slot. Which are chosen is found by comparing, as `limit_groups` does.
        T, E = logits_TE.shape
        expert_E = torch.arange(E, device=logits_TE.device)
        is_slot_TKE = chosen_TK.unsqueeze(-1) == expert_E  # (T, K) -> (T, K, E)
        is_chosen_TE = is_slot_TKE.any(1)
        weights_TE = torch.where(is_chosen_TE, (chosen_weights_TK.unsqueeze(-1) * is_slot_TKE).sum(1), p_TE)

        # Chosen tokens come before all others in the order of an expert. Sorting it again turns it into ranks.
        key_TE = weights_TE.detach() - (~is_chosen_TE).float()
        rank_TE = key_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        used_TE = rank_TE < rounded(plain.tokens_per_expert, tile, rounding)
        most_added = {"nearest": tile // 2, "up": tile - 1, "down": 0}[rounding]
        return make_routing(
            logits_TE,
            p_TE,
            weights_TE,
            expert_E.expand(T, E),
            logits_TE,
            used_TK=used_TE,
            capacity=min(T, -(-T * top_k // E) + most_added),
        )

    return route


def rounded(tokens_per_expert_E: Tensor, tile: int, rounding: Rounding) -> Tensor:
    """Counts (E,) int64 rounded to multiples of `tile`; halves to the even multiple."""
    # In integers, which are right for any count. The remainder says on which side of the half a count is.
    below_E = tokens_per_expert_E // tile
    rest_E = tokens_per_expert_E - below_E * tile
    if rounding == "down":
        is_up_E = rest_E < 0
    elif rounding == "up":
        is_up_E = rest_E > 0
    else:
        is_up_E = (2 * rest_E > tile) | ((2 * rest_E == tile) & (below_E % 2 == 1))
    return (below_E + is_up_E) * tile
