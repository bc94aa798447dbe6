"""Routers in which a token's experts depend on the other tokens of its sequence or document.

They need whole sequences: `ParametricRouter.whole_sequences`.

Shapes: B sequences, S positions, T = B * S tokens, E experts, K top_k.
"""

import math

import torch
from torch import Tensor

from titan_moe.model.routing.common import (
    Options,
    ParametricRouter,
    Routing,
    check_top_k,
    make_routing,
    normalized,
    select,
)

SUM_UNIT = 2**32  # sums of probabilities over a document are in integers of this fraction


def causal_bias(
    *, top_k: int, rate: float = 0.01, norm_topk: bool = True, score_scale: float = 1.0
) -> ParametricRouter:
    """Choose by a bias that follows the loads of the tokens before in the sequence: causal, in training and evaluation.

    s = sigmoid(logits); beta_0 = 0 and beta_t = beta_{t-1} + rate * (f_{t-1} - 1/E), where f_t is 1/K for each expert
    of token t, else 0; experts = topk(s_t - beta_t + bias); weights and scores are those of `sigmoid`. The rule needs
    the choice of each token before that of the next, so it is a loop over positions. Source: Su (2026),
    kexue.fm/archives/11760, of Chang's rule (jonathanc.net/blog/causal-routing-bias); `rate` is not from there.
    Raises ValueError when top_k < 1 or rate <= 0.
    """
    check_top_k(top_k, 1.0)
    if not 0 < rate < math.inf:
        raise ValueError(f"router.rate ({rate}) must be a finite number above 0")

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None, positions: Tensor) -> Routing:
        logits_TE = router_logits_TE.float()
        T, E = logits_TE.shape
        B, S = positions.shape
        s_TE = logits_TE.sigmoid()

        # Choices alone go into the bias, so that nothing in the loop has a gradient.
        biased_TE = s_TE.detach() if expert_bias_E is None else s_TE.detach() + expert_bias_E.float()

        # The loads lower the others' scores below a sigmoid of 0: an expert that is taken away has to stay the last.
        biased_TE = biased_TE.masked_fill(logits_TE == -math.inf, -math.inf)
        ids_BSK = causal_topk(biased_TE.view(B, S, E), top_k, rate / top_k)

        # The biases once more, of all tokens together, for balancers that go by what the choice compared.
        chosen_BSE = (ids_BSK.unsqueeze(-1) == torch.arange(E, device=logits_TE.device)).any(2).long()
        before_BSE = chosen_BSE.cumsum(1) - chosen_BSE
        passed_S1 = torch.arange(S, device=logits_TE.device).unsqueeze(-1)
        selection_TE = s_TE.detach() - rate * (before_BSE / top_k - passed_S1 / E).view(T, E)

        ids_TK = ids_BSK.view(T, top_k)
        weights_TK = s_TE.gather(-1, ids_TK)
        if norm_topk:
            weights_TK = normalized(weights_TK)
        return make_routing(logits_TE, normalized(s_TE), weights_TK * score_scale, ids_TK, selection_TE)

    return ParametricRouter(route, whole_sequences=True)


@torch.library.custom_op("titan_moe::causal_topk", mutates_args=())
def causal_topk(scores: Tensor, top_k: int, penalty: float) -> Tensor:
    """The experts (B, S, K) of largest scores (B, S, E) - penalty * how often the sequence chose the expert before.

    An operator of its own, because a compiler would unroll the loop. What all experts of a token lose alike, as the
    1/E of the rule, never changes a choice.
    """
    scores_SBE = scores.transpose(0, 1).contiguous()
    S, B, E = scores_SBE.shape
    ids_SBK = torch.empty(S, B, top_k, dtype=torch.int64, device=scores.device)
    counts_BE, ones_BK = scores.new_zeros(B, E), scores.new_ones(B, top_k)

    # Counts are whole numbers in fp32, so that their sums are exact in any order.
    for scores_BE, ids_BK in zip(scores_SBE, ids_SBK, strict=True):
        ids_BK.copy_(torch.add(scores_BE, counts_BE, alpha=-penalty).topk(top_k, dim=-1).indices)
        counts_BE.scatter_add_(1, ids_BK, ones_BK)
    return ids_SBK.transpose(0, 1).contiguous()


@causal_topk.register_fake
def _(scores: Tensor, top_k: int, penalty: float) -> Tensor:
    return scores.new_empty(*scores.shape[:2], top_k, dtype=torch.int64)


CAUSAL_TOPK = torch.ops.titan_moe.causal_topk.default


def emo(
    *, top_k: int, min_pool: int = 0, max_pool: int = 0, eval_pool: int = 0, norm_topk: bool = False
) -> ParametricRouter:
    """Let the tokens of a document choose among the document's best experts alone.

    p = softmax(logits) are the scores; the pool of a document are the M experts with the largest sum of p over its
    tokens in this sequence; experts = topk of logits + bias in the pool; weights = p[experts], over their sum with
    `norm_topk`. In training M is drawn for each document, layer and forward pass, uniformly from `min_pool` (0: top_k)
    to `max_pool` (0: all experts); in evaluation it is `eval_pool` (0: the mean of the two, rounded down). A token sees
    the later ones of its document in both. Source: EMO (Ai2), the router of OLMo-core (that of the paper's runs takes
    the softmax over the pool), where the token that ends a document belongs to the next one; here it is the document's
    own. Raises ValueError when top_k < 1 and, when it is called, for pools that are not in the order top_k, min_pool,
    max_pool, number of experts.
    """
    check_top_k(top_k, 1.0)
    options = Options(top_k, 1.0, 1, 1, 0.0, 0.0)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None, document_ids: Tensor) -> Routing:
        logits_TE = router_logits_TE.float()
        least, most = _pool_sizes(top_k, min_pool, max_pool, eval_pool, logits_TE.shape[-1])

        # Sizes of as many pools as there could be documents: how many there are is known to the device alone.
        B, S = document_ids.shape
        if torch.is_grad_enabled() and least < most:
            drawn_T = (torch.rand(B * S, device=logits_TE.device) * (most - least + 1)).long()
            size_T = least + drawn_T.clamp(max=most - least)
        else:
            fixed = eval_pool or (least + most) // 2
            size_T = torch.full((B * S,), fixed, dtype=torch.int64, device=logits_TE.device)

        # Documents are numbered in their sequence. Here sequence b has the numbers from b * S on.
        document_T = (document_ids + torch.arange(0, B * S, S, device=document_ids.device).unsqueeze(-1)).flatten()
        scores_TE = logits_TE.softmax(-1)
        in_pool_TE = pools(scores_TE.detach(), document_T, size_T)

        # The pool limits the choice alone: a balance loss sees the probabilities of all experts.
        ids_TK = select(logits_TE.masked_fill(~in_pool_TE, -math.inf), expert_bias_E, options)
        weights_TK = scores_TE.gather(-1, ids_TK)
        if norm_topk:
            weights_TK = normalized(weights_TK)
        return make_routing(logits_TE, scores_TE, weights_TK, ids_TK, logits_TE)

    return ParametricRouter(route, whole_sequences=True)


def pools(p_TE: Tensor, document_T: Tensor, size_T: Tensor) -> Tensor:
    """Which experts (T, E) each token may choose: the size_T[d] ones of largest sum of p over its document d."""
    # Sums of integers are the same in any order: a scatter of floating point would differ from run to run on a GPU.
    parts_TE = (p_TE * SUM_UNIT).long()
    sums_TE = torch.zeros_like(parts_TE).scatter_add_(0, document_T.unsqueeze(-1).expand_as(parts_TE), parts_TE)

    # Rows are documents until the last line. Sorting the order again turns it into ranks.
    rank_TE = sums_TE.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank_TE < size_T.unsqueeze(-1))[document_T]


def _pool_sizes(top_k: int, min_pool: int, max_pool: int, eval_pool: int, num_experts: int) -> tuple[int, int]:
    """The smallest and the largest pool; ValueError for sizes that don't fit."""
    least, most = min_pool or top_k, max_pool or num_experts
    if not top_k <= least <= most <= num_experts:
        raise ValueError(
            f"router.min_pool ({least}) and router.max_pool ({most}) must be in this order from moe.top_k ({top_k}) to "
            f"moe.num_experts ({num_experts})"
        )
    if eval_pool and not top_k <= eval_pool <= num_experts:
        raise ValueError(
            f"router.eval_pool ({eval_pool}) must be from moe.top_k ({top_k}) to moe.num_experts ({num_experts})"
        )
    return least, most
