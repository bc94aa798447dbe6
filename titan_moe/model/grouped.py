"""Grouped matrix products, one per expert: in the tensors' own precision and in float8.

Shapes: N rows, D and F widths, E experts.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_moe.model import fused

Precision = Literal["high", "float8", "float8_emulated"]
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max

torch.library.define("titan_moe::grouped_mm", "(Tensor a, Tensor b, Tensor offs) -> Tensor")


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """One matrix product per expert, rows of expert e being offs[e-1]:offs[e] (offs: (E,) int32 cumulative counts).

    (N, D) x (E, D, F) -> (N, F), or (D, N) x (N, F) -> (E, D, F), zero for experts without rows. It is
    torch.nn.functional.grouped_mm behind an operator of ours, because under torch.compile and FakeTensor that one takes
    bf16 only. On CUDA bf16 is one kernel without synchronisation; fp32 there takes torch's fallback, a loop over
    experts that reads `offs` on the host. Not differentiable: `expert_swiglu` has the gradients.
    """
    return torch.ops.titan_moe.grouped_mm(a, b, offs)


# Not torch.library.custom_op, whose Python wrapper costs as much as a small expert's product.
@torch.library.impl("titan_moe::grouped_mm", ("cpu", "cuda"))
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    if a.numel() == 0:  # no rows: some versions refuse the strides of an empty matrix
        return a.new_zeros(_shape(a, b, offs))
    return F.grouped_mm(a, b, offs=offs)


def _shape(a: Tensor, b: Tensor, offs: Tensor) -> tuple[int, ...]:
    return (a.shape[0], b.shape[-1]) if b.dim() == 3 else (offs.shape[0], a.shape[0], b.shape[-1])


@torch.library.register_fake("titan_moe::grouped_mm")
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(_shape(a, b, offs))


@register_flop_formula(torch.ops.titan_moe.grouped_mm)
def _(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 numbers and one fp32 factor, a power of two, for each row (last dimension): x is about x8 * factor.

    The largest number of a row comes within a factor of two of float8's largest; a power of two rounds nothing more.
    """
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2(LARGEST / largest)))
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(FLOAT8), 1 / scale


torch.library.define(
    "titan_moe::scaled_grouped_mm",
    "(Tensor a8, Tensor b8, Tensor scale_a, Tensor scale_b, Tensor offs, ScalarType dtype, bool emulate) -> Tensor",
)


@torch.library.impl("titan_moe::scaled_grouped_mm", ("cpu", "cuda"))
def _(
    a8: Tensor, b8: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, dtype: torch.dtype, emulate: bool
) -> Tensor:
    if not emulate:
        return torch._scaled_grouped_mm(a8, b8, scale_a, scale_b, offs, out_dtype=dtype, use_fast_accum=True)
    a = (a8.float() * scale_a.unsqueeze(-1)).to(dtype)  # exact in bf16, too: float8 times a power of two
    b = (b8.float() * scale_b.unsqueeze(-2)).to(dtype)
    return F.grouped_mm(a, b, offs=offs)


@torch.library.register_fake("titan_moe::scaled_grouped_mm")
def _(
    a8: Tensor, b8: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, dtype: torch.dtype, emulate: bool
) -> Tensor:
    return a8.new_empty((a8.shape[0], b8.shape[-1]), dtype=dtype)


@register_flop_formula(torch.ops.titan_moe.scaled_grouped_mm)
def _(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def float8_grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *, emulate: bool = False) -> Tensor:
    """(N, D) x (E, D, F) -> (N, F) as `grouped_mm`, with both sides in float8 e4m3, scaled by row of a and column of b.

    With `emulate` the numbers are rounded to float8, but multiplied as they came: the same up to the order of sums.
    """
    a8, scale_a = quantize_rows(a)
    bt8, scale_b = quantize_rows(b.transpose(1, 2))
    b8 = bt8.contiguous().transpose(1, 2)  # the kernel wants columns together
    scales = scale_a.squeeze(-1), scale_b.squeeze(-1).contiguous()
    return torch.ops.titan_moe.scaled_grouped_mm(a8.contiguous(), b8, *scales, offs, a.dtype, emulate)


PRODUCTS: dict[Precision, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "high": grouped_mm,
    "float8": float8_grouped_mm,
    "float8_emulated": partial(float8_grouped_mm, emulate=True),
}


# On a CPU the experts take turns, so that all between a layer's input and output is small and stays in the cache: there
# new memory costs more than arithmetic. What backward wants of forward is h13 = [h1 h3], (N, 2 F).

torch.library.define(
    "titan_moe::experts_in_turn", "(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor offs) -> (Tensor, Tensor)"
)
torch.library.define(
    "titan_moe::experts_in_turn_backward",
    "(Tensor grad_y, Tensor x, Tensor h13, Tensor w1, Tensor w2, Tensor w3, Tensor offs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


FEW_ROWS = 16  # below, to bring w1 and w3 side by side costs more than one product instead of two saves


def _split(x: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
    """The rows of each expert; last those that are after all."""
    return x.split([end - start for start, end in pairwise([0, *ends, x.shape[0]])])


@torch.library.impl("titan_moe::experts_in_turn", "cpu")
def _(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    (_, width, dim), ends = w1.shape, offs.tolist()
    y, h13, both = torch.empty_like(x), x.new_empty(x.shape[0], 2 * width), w1.new_empty(2 * width, dim)
    rows = (_split(t, ends) for t in (x, y, h13))
    for w1_e, w2_e, w3_e, x_e, y_e, h13_e in zip(w1, w2, w3, *rows, strict=False):
        h1_e, h3_e = h13_e.chunk(2, dim=1)
        if len(x_e) < FEW_ROWS:
            torch.mm(x_e, w1_e.t(), out=h1_e)
            torch.mm(x_e, w3_e.t(), out=h3_e)
        else:
            torch.mm(x_e, torch.cat((w1_e, w3_e), out=both).t(), out=h13_e)
        torch.mm(F.silu(h1_e).mul_(h3_e), w2_e.t(), out=y_e)
    return y, h13


@torch.library.impl("titan_moe::experts_in_turn_backward", "cpu")
def _(
    grad_y: Tensor, x: Tensor, h13: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ends = offs.tolist()
    grad_x, grad_w1, grad_w2, grad_w3 = (torch.empty_like(t) for t in (x, w1, w2, w3))
    rows = (_split(t, ends) for t in (grad_y, x, h13, grad_x))
    weights = w1, w2, w3, grad_w1, grad_w2, grad_w3
    for w1_e, w2_e, w3_e, grad_w1_e, grad_w2_e, grad_w3_e, grad_y_e, x_e, h13_e, grad_x_e in zip(
        *weights, *rows, strict=False
    ):
        h_e, grad_h13_e = fused.swiglu_backward_on_cpu(grad_y_e @ w2_e, h13_e)
        grad_h1_e, grad_h3_e = grad_h13_e.chunk(2, dim=1)
        torch.mm(grad_h1_e, w1_e, out=grad_x_e).addmm_(grad_h3_e, w3_e)
        torch.mm(grad_y_e.t(), h_e, out=grad_w2_e)
        torch.mm(grad_h1_e.t(), x_e, out=grad_w1_e)
        torch.mm(grad_h3_e.t(), x_e, out=grad_w3_e)
    return grad_x, grad_w1, grad_w2, grad_w3


@torch.library.register_fake("titan_moe::experts_in_turn")
def _(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 2 * w1.shape[1])


@torch.library.register_fake("titan_moe::experts_in_turn_backward")
def _(
    grad_y: Tensor, x: Tensor, h13: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(w3)


@register_flop_formula(torch.ops.titan_moe.experts_in_turn)
def _(x_shape: tuple[int, ...], w_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 6 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.titan_moe.experts_in_turn_backward)
def _(grad_shape: tuple[int, ...], x_shape: Any, h13_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 6 * grad_shape[0] * grad_shape[1] * h13_shape[1]
