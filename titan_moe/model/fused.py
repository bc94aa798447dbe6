"""SwiGLU, and the ways of rows between tokens and experts, in one pass over memory where torch takes several.

Each is an operator of ours: on a GPU one Triton kernel, elsewhere torch's operators. A compiled layer gets torch's
operators on a GPU too, because inductor fuses them with their neighbours, which it can't do with an operator of ours;
but for SwiGLU's backward, which inductor makes a kernel of its own that reads its inputs twice.
None is differentiable: the autograd functions of `dispatch` and `moe` are made of them.

Shapes: T tokens, D dim, F hidden width, K top_k, N rows.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def kernels() -> Any:
    """The Triton kernels; None where Triton is not installed (it comes with torch for GPUs on Linux)."""
    if not HAS_TRITON:
        return None
    return importlib.import_module("titan_moe.model.triton_kernels")


def _define(
    schema: str,
    formula: Callable[..., Any],
    eager: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    compiles: bool = True,
) -> Any:
    """Define the operator `titan_moe::NAME`, NAME being the schema's, and return the function to call it by.

    It is `formula` where torch compiles, else a kernel on a GPU and `eager` on a CPU. `shapes` makes empty results for
    fake tensors. With `compiles` false the kernel is taken where torch compiles for a GPU, too.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"titan_moe::{name}", schema.removeprefix(name))

    # Triton is looked for at the first call on a GPU, since a machine without one need not have it.
    def on_gpu(*arguments: Any) -> Any:
        module = kernels()
        return formula(*arguments) if module is None else getattr(module, name)(*arguments)

    torch.library.impl(f"titan_moe::{name}", "cpu")(eager)
    torch.library.impl(f"titan_moe::{name}", "cuda")(on_gpu)
    torch.library.register_fake(f"titan_moe::{name}")(shapes)
    operator = getattr(torch.ops.titan_moe, name)

    # Inductor sees the formula instead of the operator, and can fuse it.
    def call(*arguments: Any) -> Any:
        has_kernel = not compiles and HAS_TRITON and arguments[0].is_cuda
        return formula(*arguments) if torch.compiler.is_compiling() and not has_kernel else operator(*arguments)

    return call


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type to add up in: fp32, or the tensors' own where that is wider."""
    return torch.promote_types(dtype, torch.float32)


# SwiGLU, h = silu(h1) * h3, of h13 = [h1 h3].


def _swiglu(h13_N2F: Tensor) -> Tensor:
    h1_NF, h3_NF = h13_N2F.chunk(2, dim=-1)
    return F.silu(h1_NF) * h3_NF


def _swiglu_backward(grad_h_NF: Tensor, h13_N2F: Tensor) -> tuple[Tensor, Tensor]:
    h1_NF, h3_NF = h13_N2F.chunk(2, dim=-1)  # (N, 2 F) -> 2 x (N, F)
    silu_NF = F.silu(h1_NF)
    grad_h1_NF = torch.ops.aten.silu_backward(grad_h_NF * h3_NF, h1_NF)
    return silu_NF * h3_NF, torch.cat([grad_h1_NF, grad_h_NF * silu_NF], dim=-1)


def _swiglu_backward_on_cpu(grad_h_NF: Tensor, h13_N2F: Tensor) -> tuple[Tensor, Tensor]:
    """`_swiglu_backward` without buffers beside the results: on a CPU new memory costs more than arithmetic."""
    h1_NF, h3_NF = h13_N2F.chunk(2, dim=-1)  # (N, 2 F) -> 2 x (N, F)
    grad_h13_N2F = torch.empty_like(h13_N2F)
    grad_h1_NF, grad_h3_NF = grad_h13_N2F.chunk(2, dim=-1)
    silu_NF = F.silu(h1_NF)
    torch.mul(grad_h_NF, silu_NF, out=grad_h3_NF)
    torch.mul(grad_h_NF, h3_NF, out=grad_h1_NF)
    torch.ops.aten.silu_backward.grad_input(grad_h1_NF, h1_NF, grad_input=grad_h1_NF)
    return silu_NF.mul_(h3_NF), grad_h13_N2F


swiglu = _define(
    "swiglu(Tensor h13) -> Tensor",
    _swiglu,
    _swiglu,
    lambda h13: h13.new_empty(h13.shape[0], h13.shape[1] // 2),
)
# (grad_h, h13) -> (h, grad_h13). h is computed again, for the gradient of w2, instead of kept in memory since forward.
swiglu_backward = _define(
    "swiglu_backward(Tensor grad_h, Tensor h13) -> (Tensor, Tensor)",
    _swiglu_backward,
    _swiglu_backward_on_cpu,
    lambda grad_h, h13: (torch.empty_like(grad_h), torch.empty_like(h13)),
    compiles=False,
)


# Rows. `order` (N,), `row` (T, K) and `kept` (T, K) are those of a `Permutation`; rows of choices that are not kept are
# neither read nor written by the kernels.


def _gather_rows(x_TD: Tensor, order_N: Tensor, row_TK: Tensor, _: Tensor | None) -> Tensor:
    return x_TD.index_select(0, order_N // row_TK.shape[1])  # (T, D) -> (N, D): choice t * K + k is of token t


def _sum_rows(y_ND: Tensor, row_TK: Tensor, kept_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
    weights_TK = kept_TK if weights_TK is None else weights_TK
    y_TKD = y_ND[row_TK].to(at_least_fp32(y_ND.dtype))  # (N, D) -> (T, K, D)
    sum_TD = (y_TKD if weights_TK is None else y_TKD * weights_TK.unsqueeze(-1)).sum(1)
    # Not a `to` that does nothing: compiled by torch 2.11, an autograd function that ends in one has no gradient.
    return sum_TD if sum_TD.dtype == y_ND.dtype else sum_TD.to(y_ND.dtype)


def _sum_rows_on_cpu(y_ND: Tensor, row_TK: Tensor, kept_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
    """`_sum_rows` without its (T, K, D) tensor."""
    # A bag is a token, its entries are the token's rows. Its weights must have the type of the rows, which a mask may
    # be given: 0 and 1 are exact in all types.
    if weights_TK is None and kept_TK is not None:
        weights_TK = kept_TK.to(y_ND.dtype)
    if weights_TK is None or weights_TK.dtype == y_ND.dtype:
        return F.embedding_bag(row_TK, y_ND, mode="sum", per_sample_weights=weights_TK)  # (N, D) -> (T, D)

    # Beside rows in bf16, scores in fp32 are not rounded. One choice after the other, for all tokens at once.
    sum_TD = y_ND.new_zeros((row_TK.shape[0], y_ND.shape[1]), dtype=at_least_fp32(y_ND.dtype))
    for row_T, weight_T in zip(row_TK.unbind(1), weights_TK.unbind(1), strict=True):
        sum_TD.addcmul_(y_ND.index_select(0, row_T), weight_T.unsqueeze(-1))
    return sum_TD.to(y_ND.dtype)


def _weigh_rows_backward(
    grad_TD: Tensor, y_ND: Tensor, scores_TK: Tensor, order_N: Tensor, row_TK: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_ND = grad_TD.index_select(0, order_N // row_TK.shape[1])  # (T, D) -> (N, D)
    grad_scores_N = (grad_ND.to(at_least_fp32(y_ND.dtype)) * y_ND).sum(-1)
    grad_ND.mul_(scores_TK.flatten().index_select(0, order_N).unsqueeze(-1))  # rounded once, to the rows' type
    return grad_ND, grad_scores_N.to(scores_TK.dtype)[row_TK]  # (N, D), (T, K)


# (x_TD, order, row, kept) -> (N, D), the token of every row
gather_rows = _define(
    "gather_rows(Tensor x, Tensor order, Tensor row, Tensor? kept) -> Tensor",
    _gather_rows,
    _gather_rows,
    lambda x_TD, order_N, row_TK, kept_TK: x_TD.new_empty(order_N.shape[0], x_TD.shape[1]),
)
# (y_ND, row, kept, weights_TK or None) -> (T, D), the sum of every token's rows, added up in fp32
sum_rows = _define(
    "sum_rows(Tensor y, Tensor row, Tensor? kept, Tensor? weights) -> Tensor",
    _sum_rows,
    _sum_rows_on_cpu,
    lambda y_ND, row_TK, kept_TK, weights_TK: y_ND.new_empty(row_TK.shape[0], y_ND.shape[1]),
)
# (grad_TD, y_ND, scores_TK, order, row, kept) -> (grad_y_ND, grad_scores_TK), the gradients of the weighted sum
weigh_rows_backward = _define(
    "weigh_rows_backward(Tensor grad, Tensor y, Tensor scores, Tensor order, Tensor row, Tensor? kept)"
    " -> (Tensor, Tensor)",
    _weigh_rows_backward,
    _weigh_rows_backward,
    lambda grad_TD, y_ND, scores_TK, *_: (torch.empty_like(y_ND), torch.empty_like(scores_TK)),
)
