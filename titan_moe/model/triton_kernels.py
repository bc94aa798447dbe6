"""The operators of `fused` on a GPU: a Triton kernel each, which reads and writes every number once.

All arithmetic is in fp32 and rounded once, at the end. Every result is written by one program, so every run gives the
same bits. `fused` says what each function computes. Row numbers are int64 before they are multiplied by a width: the
offsets of large tensors don't fit into 32 bits.

Shapes: T tokens, D dim, F hidden width, K top_k, N rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program of SwiGLU


@triton.jit
def _swiglu(h13, h, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    h1 = tl.load(h13 + row * 2 * width + column, mask=inside).to(tl.float32)
    h3 = tl.load(h13 + row * 2 * width + width + column, mask=inside).to(tl.float32)
    tl.store(h + row * width + column, h1 * tl.sigmoid(h1) * h3, mask=inside)


@triton.jit
def _swiglu_backward(grad_h, h13, h, grad_h13, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    left = row * 2 * width + column
    h1 = tl.load(h13 + left, mask=inside).to(tl.float32)
    h3 = tl.load(h13 + left + width, mask=inside).to(tl.float32)
    grad = tl.load(grad_h + row * width + column, mask=inside).to(tl.float32)

    # silu'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z))). All three results while the numbers are in registers.
    sigmoid = tl.sigmoid(h1)
    silu = h1 * sigmoid
    tl.store(h + row * width + column, silu * h3, mask=inside)
    tl.store(grad_h13 + left, grad * h3 * sigmoid * (1 + h1 * (1 - sigmoid)), mask=inside)
    tl.store(grad_h13 + left + width, grad * silu, mask=inside)


# A program of the following kernels has one token: it holds the token's D numbers and goes through its K rows. That
# makes sums without atomic adds. `kept_mask` is not read without HAS_KEPT.


@triton.jit
def _gather_rows(x, row, kept_mask, out, width, TOP_K: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)

    # The token is read once for its K copies. A choice that is not kept has no row, and must not write to row 0.
    for choice in range(TOP_K):
        place = tl.load(row + token * TOP_K + choice)
        write = inside
        if HAS_KEPT:
            write = inside & (tl.load(kept_mask + token * TOP_K + choice) != 0)
        tl.store(out + place * width + column, value, mask=write)


@triton.jit
def _sum_rows(
    y,
    row,
    kept_mask,
    weights,
    out,
    width,
    TOP_K: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)

    # In the order of the choices, hence always the same sum. A choice that is not kept adds zeros: row 0, to which it
    # points, is another's.
    for choice in range(TOP_K):
        place = tl.load(row + token * TOP_K + choice)
        read = inside
        if HAS_KEPT:
            read = inside & (tl.load(kept_mask + token * TOP_K + choice) != 0)
        value = tl.load(y + place * width + column, mask=read, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights + token * TOP_K + choice).to(tl.float32)
        total += value
    tl.store(out + token * width + column, total, mask=inside)


@triton.jit
def _weigh_rows_backward(
    grad,
    y,
    scores,
    row,
    kept_mask,
    grad_y,
    grad_scores,
    width,
    TOP_K: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    upstream = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)

    # A row and its score get their gradients together, because both need the token's gradient. Without a row the score
    # gets 0, the sum of nothing read.
    for choice in range(TOP_K):
        place = tl.load(row + token * TOP_K + choice)
        used = inside
        if HAS_KEPT:
            used = inside & (tl.load(kept_mask + token * TOP_K + choice) != 0)
        value = tl.load(y + place * width + column, mask=used, other=0.0).to(tl.float32)
        score = tl.load(scores + token * TOP_K + choice).to(tl.float32)
        tl.store(grad_y + place * width + column, upstream * score, mask=used)
        tl.store(grad_scores + token * TOP_K + choice, tl.sum(upstream * value, 0))


def swiglu(h13_N2F: Tensor) -> Tensor:
    """(N, 2 F) -> (N, F)."""
    h13_N2F = h13_N2F.contiguous()
    h_NF = h13_N2F.new_empty(h13_N2F.shape[0], h13_N2F.shape[1] // 2)
    if h_NF.numel():
        with torch.cuda.device_of(h_NF):
            _swiglu[_tiles(h_NF)](h13_N2F, h_NF, h_NF.shape[1], BLOCK=BLOCK)
    return h_NF


def swiglu_backward(grad_h_NF: Tensor, h13_N2F: Tensor) -> tuple[Tensor, Tensor]:
    """(N, F), (N, 2 F) -> h (N, F), grad_h13 (N, 2 F)."""
    grad_h_NF, h13_N2F = grad_h_NF.contiguous(), h13_N2F.contiguous()
    h_NF, grad_h13_N2F = torch.empty_like(grad_h_NF), torch.empty_like(h13_N2F)
    if h_NF.numel():
        with torch.cuda.device_of(h_NF):
            _swiglu_backward[_tiles(h_NF)](grad_h_NF, h13_N2F, h_NF, grad_h13_N2F, h_NF.shape[1], BLOCK=BLOCK)
    return h_NF, grad_h13_N2F


def gather_rows(x_TD: Tensor, order_N: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """(T, D) -> (N, D)."""
    x_TD, row_TK = x_TD.contiguous(), row_TK.contiguous()
    out_ND = x_TD.new_empty(order_N.shape[0], x_TD.shape[1])
    if out_ND.numel():
        _by_token(_gather_rows, row_TK, kept_TK, x_TD, row_TK, _mask(kept_TK, row_TK), out_ND)
    return out_ND


def sum_rows(y_ND: Tensor, row_TK: Tensor, kept_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
    """(N, D) -> (T, D)."""
    y_ND, row_TK = y_ND.contiguous(), row_TK.contiguous()
    weighed = weights_TK is not None
    weights = weights_TK.contiguous() if weighed else row_TK  # without weights a pointer that is not read
    out_TD = y_ND.new_empty(row_TK.shape[0], y_ND.shape[1])
    if out_TD.numel():
        mask = _mask(kept_TK, row_TK)
        _by_token(_sum_rows, row_TK, kept_TK, y_ND, row_TK, mask, weights, out_TD, HAS_WEIGHTS=weighed)
    return out_TD


def weigh_rows_backward(
    grad_TD: Tensor, y_ND: Tensor, scores_TK: Tensor, _: Tensor, row_TK: Tensor, kept_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(T, D), (N, D), (T, K) -> (N, D), (T, K)."""
    grad_TD, y_ND, scores_TK, row_TK = (t.contiguous() for t in (grad_TD, y_ND, scores_TK, row_TK))
    grad_y_ND, grad_scores_TK = torch.empty_like(y_ND), torch.empty_like(scores_TK)
    if grad_TD.numel():
        mask = _mask(kept_TK, row_TK)
        tensors = grad_TD, y_ND, scores_TK, row_TK, mask, grad_y_ND, grad_scores_TK
        _by_token(_weigh_rows_backward, row_TK, kept_TK, *tensors)
    return grad_y_ND, grad_scores_TK


def _tiles(h_NF: Tensor) -> tuple[int, int]:
    return h_NF.shape[0], triton.cdiv(h_NF.shape[1], BLOCK)


def _mask(kept_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """The argument `kept_mask` of a kernel; where there is no mask, a pointer that is not read."""
    return row_TK if kept_TK is None else kept_TK.contiguous()


def _by_token(kernel, row_TK: Tensor, kept_TK: Tensor | None, *tensors: Tensor, **flags: bool) -> None:
    """Start a program for each token; the first of the tensors has rows of D numbers."""
    (tokens, top_k), width = row_TK.shape, tensors[0].shape[1]

    # A block is the whole row, and its size has to be a power of two. A warp for each 256 numbers: eight a thread.
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 256))
    with torch.cuda.device_of(row_TK):
        kernel[(tokens,)](
            *tensors, width, TOP_K=top_k, HAS_KEPT=kept_TK is not None, **flags, BLOCK=block, num_warps=warps
        )
