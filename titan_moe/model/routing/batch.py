"""Routers that look at all tokens at once: the experts choose, or tokens are assigned so that the load is even.

What a token gets then depends on the other tokens of its batch, later ones included. `base` and `sinkhorn` assign only
where gradients are recorded; in evaluation each token takes its best experts, as in their papers. Expert choice has no
such form: its evaluation, too, sees the future.

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
            f"router.name = {name!r} has no selection bias, it balances by assignment: turn off the balancers that "
            "move one (loss_free, smebu, pid and the like)"
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

        # The choice is by the rank of each token with each expert. Sorting the order again turns it into ranks without
        # a scatter, for the reason in `rank_in_expert`.
        ranked_TE = scores_TE.detach() if order == "softmax_topk" else z_TE.detach()
        kept_TE = ranked_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0) < capacity

        # Weights stay in the shape (T, E) and are 0 where a token was not taken, so that nothing has to be scattered
        # from the (C, E) that were taken. Over an expert's tokens the softmax leaves the others out by their -inf.
        if order == "softmax_topk":
            weights_TE = scores_TE * kept_TE
        else:
            weights_TE = z_TE.masked_fill(~kept_TE, -math.inf).softmax(0)

        # A token may have from no to E experts, in a tensor of fixed shape: each of the E columns is a choice, and the
        # dispatcher drops those that are not kept. The load is even by construction.
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

        # The plan depends on all tokens, so evaluation does without it. It serves the choice alone and has no gradient.
        z_TE = logits_TE / temperature
        plan_TE = sinkhorn_log_plan(z_TE.detach(), iterations) if torch.is_grad_enabled() else z_TE.detach()
        topk_experts_TK = plan_TE.topk(top_k, dim=-1).indices  # (T, E) -> (T, K)

        # Weights are of the plain logits, through which the router learns.
        scores_TE = z_TE.softmax(-1)
        weights_TE = z_TE.sigmoid() if top_k == 1 else scores_TE
        return make_routing(logits_TE, scores_TE, weights_TE.gather(-1, topk_experts_TK), topk_experts_TK, plan_TE)

    return route


def sinkhorn_log_plan(z_TE: Tensor, iterations: int) -> Tensor:
    """Log (T, E) of exp(z) scaled so that columns sum to 1 / E and rows nearly to 1 / T."""
    T, E = z_TE.shape

    # In logarithms, because exp of a large logit overflows. Columns come last: even load is what the plan is for.
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

        # The assignment depends on all tokens, so evaluation does without it. Nothing is learned through it.
        if not torch.is_grad_enabled():
            expert_T = plain_TE.argmax(-1)
        elif assignment == "exact":
            expert_T = exact_assignment(plain_TE)
        else:
            expert_T = auction_assignment(plain_TE, iterations)

        # From here on as any router with K = 1. The router learns through the sigmoid, as in BASE.
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

    # SciPy gives each column one row. So an expert has a column for each of its seats, all with the same values.
    seats = -(-T // E)
    values = value_TE.nan_to_num().cpu().double().repeat_interleave(seats, dim=1)  # (T, E) -> (T, E * seats)
    _, seat_T = linear_sum_assignment(values.numpy(), maximize=True)
    return torch.from_numpy(seat_T).to(value_TE.device) // seats


def auction_assignment(value_TE: Tensor, rounds: int) -> Tensor:
    """Nearly the assignment of `exact_assignment`, (T,), by an auction in a fixed number of rounds.

    In a round every token without an expert bids for the one that is worth most to it over its price, as much as makes
    it indifferent to the second best, and a bit more. An expert keeps its ceil(T / E) highest bids, and costs the least
    of them once it is full (Bertsekas, 1988). Starting from `balancing_prices`, a few rounds come within 1 % of the
    best sum; from zero it takes hundreds. Tokens to which all experts are equal take the seats that T leaves empty.
    """
    # There is no second best expert to bid against.
    num_tokens, E = value_TE.shape
    if E == 1:
        return torch.zeros_like(value_TE[:, 0], dtype=torch.int64)

    # Rows of zeros make as many tokens as seats, so that a complete assignment fills every expert.
    seats = -(-num_tokens // E)
    value_TE = F.pad(value_TE, (0, 0, 0, seats * E - num_tokens))  # (num_tokens, E) -> (T, E)
    T = seats * E

    # The step keeps bids rising where a token has two experts that are worth the same; it is small beside the values'
    # differences, because each token may end that much below its best.
    step = 1e-3 * value_TE.std() + 1e-6
    price_E, bid_T = balancing_prices(value_TE, PRICE_STEPS), value_TE.new_zeros(T)
    expert_T = torch.full((T,), E, device=value_TE.device)  # E: none
    load_E = expert_T.new_zeros(E)
    for _ in range(rounds):
        # All tokens compute an offer, but only those without an expert make it: shapes must not depend on the data.
        best_T2 = (value_TE - price_E).topk(2, dim=-1)
        wanted_T, is_free_T = best_T2.indices[:, 0], expert_T == E
        offer_T = price_E[wanted_T] + best_T2.values[:, 0] - best_T2.values[:, 1] + step
        expert_T, bid_T = torch.where(is_free_T, wanted_T, expert_T), torch.where(is_free_T, offer_T, bid_T)

        # New bids compete with those that were kept before; who is outbid is free again.
        bids_E = _count(expert_T, E)
        rank_T = rank_in_expert(expert_T, bid_T.argsort(descending=True, stable=True), bids_E)
        expert_T = expert_T.masked_fill(rank_T >= seats, E)
        load_E = bids_E.clamp(max=seats)

        # An expert with empty seats keeps its price: nobody has to outbid anyone there. Free tokens fall into slot E.
        lowest_E = price_E.new_full((E + 1,), math.inf).scatter_reduce_(0, expert_T, bid_T, "amin")[:E]
        price_E = torch.where(load_E == seats, lowest_E, price_E)

    # Who is left over after the last round gets a seat all the same, so that the load is even whatever the rounds. Free
    # token i takes empty seat i, which belongs to the first expert up to which there are more than i empty seats. The
    # clamps concern tokens that have an expert: their numbers are not used.
    is_free_T = expert_T == E
    seat_T = (is_free_T.cumsum(0) - 1).clamp(min=0)
    last_resort_T = torch.searchsorted((seats - load_E).cumsum(0), seat_T, right=True).clamp(max=E - 1)
    return torch.where(is_free_T, last_resort_T, expert_T)[:num_tokens]


def balancing_prices(value_TE: Tensor, steps: int) -> Tensor:
    """Prices (E,) at which about T / E tokens want each expert most, by quantile steps (`titan_moe.balancer`)."""
    T, E = value_TE.shape
    price_E = value_TE.new_zeros(E)

    # A token wants an expert most if it is above the cutoff between the token's best and second best. Raising the price
    # by the expert's (T / E)-th largest margin leaves about T / E tokens above it.
    for _ in range(steps):
        net_TE = value_TE - price_E
        margin_TE = net_TE - net_TE.topk(2, dim=-1).values.mean(-1, keepdim=True)
        price_E = price_E + margin_TE.topk(-(-T // E), dim=0).values[-1]
    return price_E


def _count(expert_T: Tensor, num_experts: int) -> Tensor:
    return expert_T.new_zeros(num_experts).scatter_add_(0, expert_T, torch.ones_like(expert_T))


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"router.iterations ({iterations}) must be at least 1")
