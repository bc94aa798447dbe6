"""Routers that look at all tokens at once: the experts choose, or tokens are assigned so that the load is even.

What a token gets then depends on the other tokens of its batch, later ones included. The assignments (`base`,
`sinkhorn`) are made where gradients are recorded; without, in evaluation, each token takes its best experts, as in
their papers. Expert choice has no such form: its evaluation, too, sees the future.

Shapes: T tokens, E experts, K top_k, C capacity of an expert.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.routing.common import (
    Router,
    Routing,
    capacity_of,
    check_top_k,
    exact_factor,
    make_routing,
    rank_in_expert,
)

PRICE_STEPS = 8
EXACT_TOKENS = 2048  # SciPy's solver takes T^2 numbers and up to T^3 operations


def _no_bias(name: str, expert_bias_E: Tensor | None) -> None:
    if expert_bias_E is not None:
        raise ValueError(
            f"router.name = {name!r} has no selection bias, it balances by assignment: turn balancer.loss_free off"
        )


def expert_choice(
    *,
    top_k: int,
    temperature: float = 1.0,
    capacity_factor: float = 1.0,
    order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk",
) -> Router:
    """Each expert chooses its C = ceil(T * top_k / E * capacity_factor) tokens: even load, some tokens get no expert.

    z = logits / temperature. Order `softmax_topk`: p = softmax(z) over experts, an expert takes its C tokens of largest
    p, with weights p (Zhou et al., 2022, section 3.2, whose capacity factor is top_k * capacity_factor here).
    `topk_softmax`: it takes its C tokens of largest z, with weights softmax(z) over these tokens (the paper's code).
    scores = softmax(z) over experts. A token's choices are all E experts, with id E where it was not taken. The choice
    compares a token with later ones: a causal model sees the future, in training and in evaluation.
    Raises ValueError when top_k < 1, temperature <= 0, capacity_factor <= 0, or for a selection bias.
    """
    check_top_k(top_k, temperature)
    if not capacity_factor > 0:
        raise ValueError(f"router.capacity_factor ({capacity_factor}) must be above 0 with expert_choice")
    factor = exact_factor(capacity_factor)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        _no_bias("expert_choice", expert_bias_E)
        logits_TE = router_logits_TE.float()
        T, E = logits_TE.shape
        capacity = capacity_of(T, top_k, E, factor)
        z_TE = logits_TE / temperature
        scores_TE = z_TE.softmax(-1)
        ranked_TE = scores_TE.detach() if order == "softmax_topk" else z_TE.detach()
        # the rank of each token with each expert; two sorts and no scatter, for the reason in `rank_in_expert`
        kept_TE = ranked_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0) < capacity
        if order == "softmax_topk":
            weights_TE = scores_TE * kept_TE
        else:
            weights_TE = z_TE.masked_fill(~kept_TE, -math.inf).softmax(0)
        experts_TE = torch.where(kept_TE, torch.arange(E, device=kept_TE.device), E)
        load_E = experts_TE.new_full((E,), capacity)
        return Routing(
            logits_TE, scores_TE, weights_TE, experts_TE, load_E, z_TE.detach(), kept=kept_TE, capacity=capacity
        )

    return route


def sinkhorn(*, top_k: int, temperature: float = 1.0, iterations: int = 32) -> Router:
    """Choose by the Sinkhorn-normalised matrix of exp(logits), weigh by the plain scores.

    exp(z), z = logits / temperature, is scaled by rows and columns, `iterations` times each, towards rows that sum to
    1 / T and columns that sum to 1 / E; experts = topk of the result; weights = softmax(z)[experts], for top_k = 1
    sigmoid(z)[experts]; scores = softmax(z). Source: S-BASE (Clark et al., 2022); Megatron-core's `sinkhorn` balancing,
    which iterates to a tolerance where we, to not wait for the device, iterate a fixed number of times. Evaluation is
    the topk of z. Raises ValueError when top_k < 1, temperature <= 0, iterations < 1, or for a selection bias.
    """
    check_top_k(top_k, temperature)
    _check_iterations(iterations)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        _no_bias("sinkhorn", expert_bias_E)
        logits_TE = router_logits_TE.float()
        z_TE = logits_TE / temperature
        plan_TE = sinkhorn_log_plan(z_TE.detach(), iterations) if torch.is_grad_enabled() else z_TE.detach()
        topk_experts_TK = plan_TE.topk(top_k, dim=-1).indices
        scores_TE = z_TE.softmax(-1)
        weights_TE = z_TE.sigmoid() if top_k == 1 else scores_TE
        return make_routing(logits_TE, scores_TE, weights_TE.gather(-1, topk_experts_TK), topk_experts_TK, plan_TE)

    return route


def sinkhorn_log_plan(z_TE: Tensor, iterations: int) -> Tensor:
    """Log of exp(z) scaled so that columns sum to 1 / E and rows nearly to 1 / T."""
    T, E = z_TE.shape
    column_1E = z_TE.new_zeros(1, E)
    row_T1 = z_TE.new_zeros(T, 1)
    for _ in range(iterations):
        row_T1 = -math.log(T) - (z_TE + column_1E).logsumexp(1, keepdim=True)
        column_1E = -math.log(E) - (z_TE + row_T1).logsumexp(0, keepdim=True)
    return z_TE + row_T1 + column_1E


def base(*, top_k: int, assignment: Literal["auction", "exact"] = "auction", iterations: int = 16) -> Router:
    """Assign every token to one expert so that no expert gets more than ceil(T / E) and the sum of logits is largest.

    weights = sigmoid(logits[expert]); scores = softmax(logits). Source: BASE layers (Lewis et al., 2021), section 3, of
    the tokens of a forward pass on one rank. `exact`: SciPy's linear_sum_assignment on the CPU, for up to 2048 tokens;
    waits for the device. `auction`: Bertsekas' auction (as BASE's code) for `iterations` rounds, after which the tokens
    that still have no expert fill the seats that are left. Evaluation takes each token's best expert, as BASE does.
    Raises ValueError when top_k is not 1, iterations < 1, for a selection bias, and by `exact` for more tokens.
    """
    if top_k != 1:
        raise ValueError(f"router.name = 'base' assigns each token to one expert: moe.top_k ({top_k}) must be 1")
    _check_iterations(iterations)

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        _no_bias("base", expert_bias_E)
        logits_TE = router_logits_TE.float()
        plain_TE = logits_TE.detach()
        if not torch.is_grad_enabled():
            expert_T = plain_TE.argmax(-1)
        elif assignment == "exact":
            expert_T = exact_assignment(plain_TE)
        else:
            expert_T = auction_assignment(plain_TE, iterations)
        expert_T1 = expert_T.unsqueeze(1)
        weights_T1 = logits_TE.gather(-1, expert_T1).sigmoid()
        return make_routing(logits_TE, logits_TE.softmax(-1), weights_T1, expert_T1, plain_TE)

    return route


def exact_assignment(value_TE: Tensor) -> Tensor:
    """The expert (T,) of each token that makes the sum of values largest, at most ceil(T / E) tokens to an expert."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ValueError('router.assignment = "exact" needs SciPy: pip install scipy') from None
    T, E = value_TE.shape
    if T > EXACT_TOKENS:
        raise ValueError(
            f'router.assignment = "exact" assigns up to {EXACT_TOKENS} tokens of a forward pass, not {T}: lower '
            'training.local_batch_size, or take "auction"'
        )
    seats = -(-T // E)
    values = value_TE.nan_to_num().cpu().double().repeat_interleave(seats, dim=1)
    _, seat_T = linear_sum_assignment(values.numpy(), maximize=True)
    return torch.from_numpy(seat_T).to(value_TE.device) // seats


def auction_assignment(value_TE: Tensor, rounds: int) -> Tensor:
    """Nearly the same, at most ceil(T / E) tokens to an expert, by an auction in a fixed number of rounds.

    In a round every token without an expert bids for the one that is worth most to it over its price, as much as makes
    it indifferent to the second best, and a bit more; an expert keeps its ceil(T / E) highest bids, and costs the least
    of them once it is full (Bertsekas, 1988). Starting from `balancing_prices`, a few rounds come within 1 % of the
    best sum; from zero it takes hundreds. Tokens to whom all experts are equal take the seats that T leaves empty.
    """
    num_tokens, E = value_TE.shape
    if E == 1:
        return torch.zeros_like(value_TE[:, 0], dtype=torch.int64)
    seats = -(-num_tokens // E)
    value_TE = F.pad(value_TE, (0, 0, 0, seats * E - num_tokens))
    T = seats * E
    step = 1e-3 * value_TE.std() + 1e-6
    price_E, bid_T = balancing_prices(value_TE, PRICE_STEPS), value_TE.new_zeros(T)
    expert_T = torch.full((T,), E, device=value_TE.device)  # E: none
    load_E = expert_T.new_zeros(E)
    for _ in range(rounds):
        best_T2 = (value_TE - price_E).topk(2, dim=-1)
        wanted_T, free_T = best_T2.indices[:, 0], expert_T == E
        offer_T = price_E[wanted_T] + best_T2.values[:, 0] - best_T2.values[:, 1] + step
        expert_T, bid_T = torch.where(free_T, wanted_T, expert_T), torch.where(free_T, offer_T, bid_T)
        bids_E = _count(expert_T, E)
        rank_T = rank_in_expert(expert_T, bid_T.argsort(descending=True, stable=True), bids_E)
        expert_T = expert_T.masked_fill(rank_T >= seats, E)
        load_E = bids_E.clamp(max=seats)
        lowest_E = price_E.new_full((E + 1,), math.inf).scatter_reduce_(0, expert_T, bid_T, "amin")[:E]
        price_E = torch.where(load_E == seats, lowest_E, price_E)
    free_T = expert_T == E
    seat_T = (free_T.cumsum(0) - 1).clamp(min=0)
    left_T = torch.searchsorted((seats - load_E).cumsum(0), seat_T, right=True).clamp(max=E - 1)
    return torch.where(free_T, left_T, expert_T)[:num_tokens]


def balancing_prices(value_TE: Tensor, steps: int) -> Tensor:
    """Prices (E,) at which about T / E tokens want each expert most, by quantile steps (`titan_moe.balancer`)."""
    T, E = value_TE.shape
    price_E = value_TE.new_zeros(E)
    for _ in range(steps):
        net_TE = value_TE - price_E
        above_TE = net_TE - net_TE.topk(2, dim=-1).values.mean(-1, keepdim=True)
        price_E = price_E + above_TE.topk(-(-T // E), dim=0).values[-1]
    return price_E


def _count(expert_T: Tensor, num_experts: int) -> Tensor:
    return expert_T.new_zeros(num_experts).scatter_add_(0, expert_T, torch.ones_like(expert_T))


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"router.iterations ({iterations}) must be at least 1")
