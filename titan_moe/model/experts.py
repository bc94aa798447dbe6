"""Grouped matrix products, one per expert: in the tensors' own precision and in float8.

Each product is an operator of ours: a kernel, a fake kernel (the result's shape alone, for torch.compile and estimates)
and a formula that counts its operations.

Shapes: N rows, D and F widths, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Precision = Literal["high", "float8", "float8_emulated"]
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max

torch.library.define("titan_moe::grouped_mm", "(Tensor a, Tensor b, Tensor offs) -> Tensor")


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """One matrix product per expert, rows of expert e being offs[e-1]:offs[e] (offs: (E,) int32 cumulative counts).

    (N, D) x (E, D, F) -> (N, F), or (D, N) x (N, F) -> (E, D, F), zero for experts without rows. It is
    torch.nn.functional.grouped_mm behind an operator of ours, because torch's takes only bf16 under torch.compile and
    FakeTensor. On CUDA bf16 is one kernel without synchronisation; fp32 there takes torch's fallback, a loop over
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
    # Weights (E, D, F) take rows to rows; rows (N, F) instead of weights make the gradient of weights.
    return (a.shape[0], b.shape[-1]) if b.dim() == 3 else (offs.shape[0], a.shape[0], b.shape[-1])


@torch.library.register_fake("titan_moe::grouped_mm")
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(_shape(a, b, offs))


@register_flop_formula(torch.ops.titan_moe.grouped_mm)
def _(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    # For both kinds, whatever the counts: each row meets the matrix of one expert.
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 numbers (..., D) and an fp32 factor (..., 1), a power of two, for each row: x is about x8 * factor.

    The largest number of a row comes within a factor of two of float8's largest; a power of two rounds nothing more.
    """
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)  # (..., D) -> (..., 1); no division by 0
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

    # Without the kernel's hardware: exact in bf16, too, which holds every float8 times a power of two.
    a = (a8.float() * scale_a.unsqueeze(-1)).to(dtype)
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

    With `emulate` the numbers are rounded to float8, but multiplied in their own type: equal up to the order of sums.
    """
    # A scale may not vary along D, over which the product sums: it is per row of a and per column of b.
    a8, scale_a = quantize_rows(a)  # (N, D), (N, 1)
    bt8, scale_b = quantize_rows(b.transpose(1, 2))  # (E, F, D), (E, F, 1)

    # The kernel wants each column of b in one piece of memory.
    b8 = bt8.contiguous().transpose(1, 2)  # (E, D, F)
    scales = scale_a.squeeze(-1), scale_b.squeeze(-1).contiguous()
    return torch.ops.titan_moe.scaled_grouped_mm(a8.contiguous(), b8, *scales, offs, a.dtype, emulate)


PRODUCTS: dict[Precision, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "high": grouped_mm,
    "float8": float8_grouped_mm,
    "float8_emulated": partial(float8_grouped_mm, emulate=True),
}
