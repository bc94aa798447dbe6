"""Who computes the experts: torch's grouped products, a library's kernels, or a function of the user's.

A backend is a function (x_ND, w1, w2, w3, tokens_per_expert_E) -> y_ND that does what `expert_swiglu` does, gradients
included: rows come sorted by expert, w1 and w3 are (E, F, D), w2 is (E, D, F), and rows after the sum of
tokens_per_expert_E hold anything. It sees plain tensors of this process's experts alone. A checkpoint does not depend
on it.

Shapes: N rows, D dim, F hidden width, E experts, M tiles of rows.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from titan_moe.model.moe import ExpertsBackend, MoE, expert_swiglu

LIGER_VERSIONS = ((0, 8, 5), (0, 9))  # from, below: the kernels used here are private, any other version may differ
ROWS_OF_TILE = 64  # liger's BLOCK_M_TOKEN


class Tiles(NamedTuple):
    """The rows of each expert, cut into tiles of ROWS_OF_TILE; the last tile of an expert may not be full."""

    expert_start: Tensor  # (E + 1,) int32: the first row of each expert, and the end of the last one's
    row: Tensor  # (M,) int32: the first row of each tile; a tile that is not needed begins at or after the last end
    expert: Tensor  # (M,) int32: whose rows they are


def cut_into_tiles(tokens_per_expert_E: Tensor, rows: int) -> Tiles:
    """Cut `rows` rows into as many tiles as there could be: how many there are, only the device knows."""
    num_experts = tokens_per_expert_E.shape[0]
    count_E = tokens_per_expert_E.to(torch.int32)
    start_E1 = F.pad(count_E.cumsum(0, dtype=torch.int32), (1, 0))  # (E,) -> (E + 1,)
    tiles_E = (count_E + ROWS_OF_TILE - 1) // ROWS_OF_TILE
    end_E = tiles_E.cumsum(0, dtype=torch.int32)

    # The full tiles of all rows, and for each expert one that is not full, are never too few. The expert of a tile is
    # found by a search instead of by repeating experts, whose result would have a length that depends on the data.
    tile_M = torch.arange(rows // ROWS_OF_TILE + num_experts, device=count_E.device, dtype=torch.int32)
    expert_M = torch.searchsorted(end_E, tile_M, right=True).clamp(max=num_experts - 1)
    row_M = start_E1[expert_M] + (tile_M - (end_E - tiles_E)[expert_M]) * ROWS_OF_TILE
    return Tiles(start_E1, row_M, expert_M.to(torch.int32))


# Liger's kernels as operators, because torch.compile and FakeTensor can't look into them. Its own autograd function is
# not used: it sorts by expert again, waits for the device once a layer to learn how many tiles there are, and sums each
# token's rows, which `dispatch` does here.

torch.library.define(
    "titan_moe::liger_experts",
    "(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor start, Tensor row, Tensor expert) -> (Tensor, Tensor)",
)
torch.library.define(
    "titan_moe::liger_experts_backward",
    "(Tensor grad_y, Tensor x, Tensor h, Tensor w1, Tensor w2, Tensor w3, Tensor start, Tensor row, Tensor expert)"
    " -> (Tensor, Tensor, Tensor)",
)


@functools.cache
def _liger() -> ModuleType:
    return importlib.import_module("liger_kernel.ops.fused_moe_kernels")


def _strides(*named: tuple[str, Tensor]) -> dict[str, int]:
    """A kernel's arguments `stride_W_E=...`, from pairs of a tensor's stride names ("W_E W_H") and the tensor."""
    return {
        f"stride_{name}": stride for names, x in named for name, stride in zip(names.split(), x.stride(), strict=True)
    }


def _grid(first: Any, size: int, block: str = "BLOCK_N") -> Callable[[dict[str, int]], tuple[int, int]]:
    # A function, because the block's size is known only once Triton has picked a configuration.
    return lambda meta: (first(meta) if callable(first) else first, -(-size // meta[block]))


@torch.library.impl("titan_moe::liger_experts", ("cpu", "cuda"))
def _(
    x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, start: Tensor, row: Tensor, expert: Tensor
) -> tuple[Tensor, Tensor]:
    # The kernel computes w1 and w3 as one matrix.
    rows, (hidden, dim) = x_ND.shape[0], w1.shape[1:]
    w13 = torch.cat([w1, w3], dim=1)  # (E, 2F, D)
    h_N2F, gated_NF, y_ND = x_ND.new_empty(rows, 2 * hidden), x_ND.new_empty(rows, hidden), torch.empty_like(x_ND)
    sizes = {"H_dim": dim, "I_dim": hidden, "BLOCK_M": ROWS_OF_TILE}

    # The kernel gathers rows by token; ours are sorted already, so row i is at place i.
    same_N = torch.arange(rows, device=x_ND.device, dtype=torch.int32)
    _liger()._fused_up_proj_swiglu_kernel[_grid(len(row), hidden)](
        *(x_ND, w13, same_N, start, row, expert, h_N2F, gated_NF),
        **sizes,
        **_strides(("x_T x_H", x_ND), ("w_E w_N w_K", w13), ("pre_TK pre_N", h_N2F), ("post_TK post_N", gated_NF)),
    )

    # What the gradients need of the first product is given out: h before the gate, from which they make the rest.
    _liger()._fused_down_proj_kernel[_grid(len(row), dim)](
        *(gated_NF, w2, start, row, expert, y_ND),
        **sizes,
        **_strides(("post_TK post_I", gated_NF), ("w_E w_H w_I", w2), ("Y_TK Y_H", y_ND)),
    )
    return y_ND, h_N2F


@torch.library.impl("titan_moe::liger_experts_backward", ("cpu", "cuda"))
def _(
    grad_y_ND: Tensor,
    x_ND: Tensor,
    h_N2F: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    start: Tensor,
    row: Tensor,
    expert: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, rows, (num_experts, hidden, dim) = _liger(), x_ND.shape[0], w1.shape
    w13 = torch.cat([w1, w3], dim=1)  # (E, 2F, D); made anew, so that FSDP2 can free what it is made of
    grad_h_N2F, gated_NF, grad_x_ND = torch.empty_like(h_N2F), h_N2F.new_empty(rows, hidden), torch.empty_like(x_ND)
    sizes, tile = {"H_dim": dim, "I_dim": hidden}, {"BLOCK_M": ROWS_OF_TILE}

    # The kernel multiplies rows by scores and computes the scores' gradient. Here `combine` multiplies by them, so the
    # scores are all 1 and their gradient is not used.
    same_N = torch.arange(rows, device=x_ND.device, dtype=torch.int32)
    ones_N, unused_N = x_ND.new_ones(rows), x_ND.new_zeros(rows, dtype=torch.float32)
    kernels._moe_bwd_down_proj_kernel[_grid(len(row), hidden)](
        *(grad_y_ND, same_N, same_N, ones_N, w2, h_N2F, start, row, expert, grad_h_N2F, gated_NF, unused_N),
        **sizes,
        **tile,
        **_strides(("dO_T dO_H", grad_y_ND), ("w_E w_H w_I", w2), ("pre_TK pre_N", h_N2F)),
        **_strides(("d_pre_TK d_pre_N", grad_h_N2F), ("wact_TK wact_I", gated_NF)),
    )

    # The kernels don't write the gradient of an expert without rows: it has to be zero before.
    grad_w2, grad_w13 = torch.zeros_like(w2), torch.zeros_like(w13)
    kernels._moe_bwd_dW2_kernel[_grid(lambda meta: num_experts * -(-hidden // meta["BLOCK_M"]), dim)](
        *(gated_NF, grad_y_ND, same_N, start, grad_w2),
        **sizes,
        **_strides(("wact_TK wact_I", gated_NF), ("dout_T dout_H", grad_y_ND), ("dW2_E dW2_H dW2_I", grad_w2)),
    )

    # Through the first product, to the rows and to both of its weights at once.
    kernels._moe_bwd_dX_expanded_kernel[_grid(len(row), dim)](
        *(grad_h_N2F, w13, start, row, expert, grad_x_ND),
        **sizes,
        **tile,
        **_strides(("d_pre_TK d_pre_N", grad_h_N2F), ("w_E w_N w_K", w13), ("dxe_TK dxe_H", grad_x_ND)),
    )
    kernels._moe_bwd_dW1_kernel[_grid(lambda meta: num_experts * -(-dim // meta["BLOCK_M"]), 2 * hidden)](
        *(x_ND, grad_h_N2F, same_N, start, grad_w13),
        **sizes,
        **_strides(("x_T x_H", x_ND), ("d_pre_TK d_pre_N", grad_h_N2F), ("dW1_E dW1_N dW1_H", grad_w13)),
    )
    return grad_x_ND, grad_w13, grad_w2


@torch.library.register_fake("titan_moe::liger_experts")
def _(x_ND: Tensor, w1: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(x_ND.shape[0], 2 * w1.shape[1])


@torch.library.register_fake("titan_moe::liger_experts_backward")
def _(
    grad_y_ND: Tensor, x_ND: Tensor, h_N2F: Tensor, w1: Tensor, w2: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, hidden, dim = w1.shape
    return torch.empty_like(x_ND), w1.new_empty(num_experts, 2 * hidden, dim), torch.empty_like(w2)


@register_flop_formula(torch.ops.titan_moe.liger_experts)
def _(x_shape: tuple[int, ...], w1_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    # Three matrices, and for each row a multiplication and an addition by every number of them.
    return 3 * 2 * x_shape[0] * w1_shape[1] * w1_shape[2]


@register_flop_formula(torch.ops.titan_moe.liger_experts_backward)
def _(grad_y_shape: tuple[int, ...], x_shape: Any, h_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    # Twice as many as forward: the gradients of rows and of weights. h is 2 F wide.
    return 6 * grad_y_shape[0] * grad_y_shape[1] * h_shape[1]


class _LigerExperts(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *tiles: Tensor) -> Tensor:
        y_ND, h_N2F = torch.ops.titan_moe.liger_experts(x_ND, w1, w2, w3, *tiles)
        ctx.save_for_backward(x_ND, h_N2F, w1, w2, w3, *tiles)
        return y_ND

    @staticmethod
    def backward(ctx: Any, grad_y_ND: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        grads = torch.ops.titan_moe.liger_experts_backward(grad_y_ND.contiguous(), *ctx.saved_tensors)
        grad_x_ND, grad_w13, grad_w2 = grads
        grad_w1, grad_w3 = grad_w13.chunk(2, dim=1)
        return grad_x_ND, grad_w1, grad_w2, grad_w3, None, None, None


def liger_experts(x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """`expert_swiglu` by the Triton kernels of liger-kernel: w1, w3 and SwiGLU in one, its gradient in another.

    Sums are in fp32, whatever the tensors' type; fp32 tensors are multiplied as TF32 on a GPU. Source: Hsu et al.
    (2024), Liger Kernel; after Guo et al. (2025), SonicMoE.
    """
    tiles = cut_into_tiles(tokens_per_expert_E, x_ND.shape[0])
    return _LigerExperts.apply(x_ND.contiguous(), w1, w2, w3, *tiles)


EXPERTS_BACKENDS: dict[str, ExpertsBackend] = {"grouped_mm": expert_swiglu, "liger": liger_experts}


def use_experts_backend(model: nn.Module, backend: ExpertsBackend) -> None:
    """Let `backend` compute the experts of every MoE layer; parameters and their names stay."""
    if backend is expert_swiglu:
        return
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.experts.backend = backend


def _is_interpreted() -> bool:
    return importlib.import_module("triton.knobs").runtime.interpret


def _is_tuned() -> bool:
    return len(_liger()._moe_bwd_dW1_kernel.configs) > 1


def check_signature(name: str, backend: ExpertsBackend) -> None:
    """Raise ValueError where a function can't be called with a backend's five arguments."""
    try:
        inspect.signature(backend).bind(*["x_ND", "w1", "w2", "w3", "tokens_per_expert_E"])
    except TypeError as error:
        raise ValueError(
            f"moe.experts_backend = {name!r} does not fit here: it must take (x_ND, w1, w2, w3, tokens_per_expert_E) "
            f"by position, but {error}"
        ) from None


def check_experts_backend(name: str, *, device: torch.device, param_dtype: torch.dtype, deterministic: bool) -> None:
    """Raise ValueError where this machine or installation can't compute experts by `name`.

    Only "liger" has conditions that are known here; other backends raise their own errors when they are called.
    """
    if name != "liger":
        return

    # Is it installed, in a version whose kernels are the ones called here?
    key, otherwise = "moe.experts_backend = 'liger'", "or take 'grouped_mm'"
    missing = [package for package in ("triton", "liger_kernel") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{key} needs {missing[0]}: pip install 'titan_moe[kernels]', {otherwise}")
    version = importlib.metadata.version("liger-kernel")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if not LIGER_VERSIONS[0] <= numbers < LIGER_VERSIONS[1]:
        raise ValueError(f"{key} knows the kernels of liger-kernel 0.8.5 to 0.8.x, this is {version}: {otherwise[3:]}")

    # Triton has kernels for GPUs. Its interpreter runs them on a CPU, for tests of the numbers.
    if device.type != "cuda" and not _is_interpreted():
        raise ValueError(
            f"{key} needs a GPU, this is a CPU: {otherwise[3:]}; to try out the numbers, slowly, set "
            "TRITON_INTERPRET=1 and LIGER_FUSED_MOE_AUTOTUNE=0 in the environment"
        )

    # It would train, but not with the precision, or not with the same bits, that the settings promise.
    if device.type == "cuda" and param_dtype != torch.bfloat16:
        raise ValueError(
            f"{key} needs training.mixed_precision_param = 'bfloat16', {otherwise}: a GPU multiplies fp32 as TF32 there"
        )
    if deterministic and _is_tuned():
        raise ValueError(
            f"{key} picks kernels by timing them, so that sums are added up in another order in the next run: with "
            f"training.deterministic set LIGER_FUSED_MOE_AUTOTUNE=0 in the environment, {otherwise}"
        )
