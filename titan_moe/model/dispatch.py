"""Dispatchers: how tokens get to their experts and the experts' outputs back.

A dispatcher is three functions. `dispatch(x_TD, routing)` gives (x_ND, tokens_per_expert_E, permutation, state): one
row for each of the N = T * K choices, and how many rows each of this process's experts has. The rows may be on their
way still, so that something else can be computed meanwhile: `receive(x_ND, state)` waits for them, and gives them
sorted by expert. `send_back(y_ND, state)` gives the experts' outputs to where their tokens are, in the order of the
permutation; `combine_rows` then makes of them, for each token, the weighted sum of its rows.

No (T, E) mask is built, and nothing waits for the device. Sorting gives a permutation, so the backward of both is again
a gather: no atomic adds, hence the same bits in every run. Choices that a router did not keep, and those of identity
experts, have no row. N is then min(T * K, E * capacity), or T * K without a capacity, which may be more than there are
rows: those after the last expert's are not computed and hold anything.

Shapes: T tokens, D dim, K top_k, N = T * K rows, E experts without the identity experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from titan_moe.model import fused
from titan_moe.model.routing import Routing


class Dispatcher(NamedTuple):
    """The three functions of a dispatcher; `state` is what the others need to know of its dispatch."""

    dispatch: Callable[[Tensor, Routing], tuple[Tensor, Tensor, "Permutation", Any]]
    receive: Callable[[Tensor, Any], Tensor]
    send_back: Callable[[Tensor, Any], Tensor]


class Permutation(NamedTuple):
    """Which choice each row is of, and which row each choice has."""

    order: Tensor  # (N,) int64: row i of the sorted rows is choice order[i] = t * K + k
    row: Tensor  # (T, K) int64: the row of choice k of token t; 0 where it has none
    kept: Tensor | None = None  # (T, K) bool, the choices that have a row; None: all


def local() -> Dispatcher:
    """All experts on this process: a stable sort by expert, and rows that stay where they are."""
    return Dispatcher(_dispatch_local, lambda x_ND, _: x_ND, lambda y_ND, _: y_ND)


def _dispatch_local(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Permutation, None]:
    permutation, tokens_per_expert_E = sort_choices(routing)
    return gather_rows(x_TD, permutation), tokens_per_expert_E, permutation, None  # (N, D), (E,)


def computed_choices(routing: Routing) -> Tensor | None:
    """The choices that an expert computes, (T, K) bool: kept, and of no identity expert. None: all."""
    if not routing.num_identity_experts:
        return routing.kept
    has_weights_TK = routing.topk_experts < routing.scores.shape[-1] - routing.num_identity_experts
    return has_weights_TK if routing.kept is None else has_weights_TK & routing.kept


def sort_choices(routing: Routing) -> tuple[Permutation, Tensor]:
    """The order of the choices by expert, and how many rows each expert has, (E,) int64."""
    computed_TK, num_experts = computed_choices(routing), routing.scores.shape[-1] - routing.num_identity_experts
    if computed_TK is None:
        return sort_by_expert(routing.topk_experts, num_experts), routing.tokens_per_expert
    capacity = len(computed_TK) if routing.capacity is None else routing.capacity
    return sort_computed(routing.topk_experts, computed_TK, num_experts, capacity)


def sort_by_expert(topk_experts_TK: Tensor, num_experts: int) -> Permutation:
    """The stable order of the T * K choices by expert, and its inverse."""
    order_N = _argsort(topk_experts_TK.flatten(), num_experts)  # (T, K) -> (N,)

    # order[row] = choice, so row[order] = 0, 1, 2, ...: a scatter inverts a permutation without another sort.
    row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    return Permutation(order_N, row_N.view_as(topk_experts_TK))  # (N,), (T, K)


def sort_computed(
    topk_experts_TK: Tensor, computed_TK: Tensor, num_experts: int, capacity: int
) -> tuple[Permutation, Tensor]:
    """The stable order by expert of the choices that are computed, and how many each expert has, (E,) int64."""
    # The others will point to row 0, so there must be one: if nobody computes anything, the first choice goes to the
    # last expert. Its weight is 0.
    is_first_TK = torch.zeros_like(computed_TK)
    is_first_TK[:1, :1] = True
    has_row_TK = computed_TK | (is_first_TK & ~computed_TK.any())

    # Choices without a row get the number after the last expert's: they are sorted to the end, and counted apart.
    key_N = torch.where(has_row_TK, topk_experts_TK.clamp(max=num_experts - 1), num_experts).flatten()  # (T, K) -> (N,)
    counts_E = key_N.new_zeros(num_experts + 1).scatter_add_(0, key_N, torch.ones_like(key_N))[:num_experts]  # (E,)

    # Only the device knows how many choices have a row. The rows are as many as could be, which the host knows.
    num_rows = min(key_N.numel(), num_experts * capacity)
    order_N = _argsort(key_N, num_experts)

    # The inverse, without a scatter (`rank_in_expert` says why). A choice without a row points to row 0, because its
    # own place may be after the last row.
    row_TK = order_N.argsort().view_as(has_row_TK) * has_row_TK  # (N,) -> (T, K)
    return Permutation(order_N[:num_rows], row_TK, has_row_TK), counts_E


def _argsort(key_N: Tensor, largest: int) -> Tensor:
    """Sort stably, as int16 where keys fit: a GPU sorts digit by digit, two bytes take half the time of eight."""
    fits = largest <= torch.iinfo(torch.int16).max
    return (key_N.to(torch.int16) if fits else key_N).argsort(stable=True)


def gather_rows(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """The token of every row: (T, D) -> (N, D)."""
    return _Gather.apply(x_TD, *permutation)


def combine_rows(y_ND: Tensor, topk_scores_TK: Tensor, permutation: Permutation) -> Tensor:
    """The sum of every token's rows, each times its score, which is 0 for what was not kept: (N, D) -> (T, D).

    Accumulated in fp32.
    """
    return _Combine.apply(y_ND, topk_scores_TK, *permutation)


def combine_choices(y_ND: Tensor, routing: Routing, permutation: Permutation, x_TD: Tensor) -> Tensor:
    """The weighted sum of what each token's experts gave, identity experts included: (N, D) -> (T, D)."""
    if not routing.num_identity_experts:
        return combine_rows(y_ND, routing.topk_scores, permutation)

    # What no expert computes and has a weight is an identity expert's. All of them give the same, so one product with
    # the sum of their weights is enough.
    computed_TK = computed_choices(routing)
    assert computed_TK is not None
    of_experts_TK = torch.where(computed_TK, routing.topk_scores, 0)
    identity_T1 = torch.where(computed_TK, 0, routing.topk_scores).sum(-1, keepdim=True)  # (T, K) -> (T, 1)
    return (combine_rows(y_ND, of_experts_TK, permutation) + x_TD * identity_T1).to(y_ND.dtype)


def rows_of_choices(y_ND: Tensor, permutation: Permutation, computed_TK: Tensor | None) -> Tensor:
    """The row of each choice, 0 where none was computed: (N, D) -> (T, K, D)."""
    T, K = permutation.row.shape
    y_TKD = permute(y_ND, permutation.row.flatten(), permutation.order).view(T, K, -1)
    return y_TKD if computed_TK is None else y_TKD.masked_fill(~computed_TK.unsqueeze(-1), 0)


def permute(x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    """Rows in another order: row i of the result is row order[i]."""
    return _Permute.apply(x_MD, order_M, inverse_M)


# Autograd's own backward of a gather adds atomically, in an order that varies from run to run. With the inverse each
# token's gradient is a sum over its own K rows, in their order.


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return fused.gather_rows(x_TD, order_N, row_TK, kept_TK)  # (T, D) -> (N, D)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore
        row_TK, kept_TK = ctx.saved_tensors
        return fused.sum_rows(grad_ND, row_TK, kept_TK, None), None, None, None  # (N, D) -> (T, D)


class _Permute(Function):
    """Rows in another order; by the inverse its gradient is a gather too, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore
        (inverse_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, inverse_M), None, None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, scores_TK: Tensor, order_N: Tensor, row_TK: Tensor, kept_TK: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(y_ND, scores_TK, order_N, row_TK, kept_TK)
        return fused.sum_rows(y_ND, row_TK, kept_TK, scores_TK)  # (N, D) -> (T, D)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyrefly: ignore
        grad_y_ND, grad_scores_TK = fused.weigh_rows_backward(grad_TD, *ctx.saved_tensors)  # (T, D) -> (N, D), (T, K)
        return grad_y_ND, grad_scores_TK, None, None, None
