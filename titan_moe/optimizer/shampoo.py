"""Shampoo for each expert by itself: inverse roots of the two Kronecker factors of every block, AdamW's step size.

Gupta, Koren and Singer (2018), in the form of Distributed Shampoo (Shi et al., 2023, algorithm 2 with AdamW grafting):
per block of a matrix, with its gradient G, at its step t from 1,

    L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G
    X_L = (L / (1 - beta2^n) + epsilon I)^-exponent, X_R likewise, after n gradients, every
        `precondition_frequency` steps
    m, v as AdamW's; a = m' / (sqrt(v') + eps) with both bias-corrected
    P = X_L m' X_R |a| / |X_L m' X_R| (Frobenius norms) from `start_preconditioning_step` on, before it P = a
    W <- W - lr (P + weight_decay W)

Blocks side by side may share factors (`titan_moe.optimizer.kronecker`): G is then a whole strip of the matrix.

Shapes: R rows (experts), M x N a matrix.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_moe.optimizer.kronecker import block_layout, init_factor, init_root, refresh_root, strip_layout
from titan_moe.optimizer.transform import State, Tick, Transform, adamw, momentum
from titan_moe.runtime.dtypes import DTYPES

Grafting = Literal["adamw", "none"]
RootDtype = Literal["auto", "float32", "bfloat16"]


def shampoo(
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    epsilon: float = 1e-12,
    exponent: float = 0.0,
    grafting: Grafting = "adamw",
    precondition_frequency: int = 100,
    start_preconditioning_step: int = -1,
    statistics_every: int = 1,
    max_preconditioner_dim: int = 1024,
    adamw_above: int = 8192,
    share_factors: bool = False,
    one_sided: bool = False,
    matmul_dtype: RootDtype = "float32",
    stagger_roots: bool = False,
) -> Transform:
    """Shampoo with AdamW's step size, each expert by itself; the paper's section 3.5 (Shi et al., 2023).

    Inverse roots (factor + epsilon)^-exponent are computed every `precondition_frequency` steps from
    `start_preconditioning_step` on (-1: the first of these); before it the step is AdamW's. Exponent 0 is 1/4, or 1/2
    with `one_sided`, which keeps only the factor of a matrix' shorter side. With `grafting` "none" the step is
    X_L m' X_R itself, with identities for roots until the first are computed. Factors see the gradients of steps 1,
    1 + statistics_every, ... Matrices are cut into blocks of at most `max_preconditioner_dim`. Each block has factors
    of its own, or with `share_factors` each row and each column of blocks has one. A matrix with a dimension above
    `adamw_above` is AdamW's. `stagger_roots` spreads the roots of different tensors evenly over the steps. Roots are
    kept and multiplied in `matmul_dtype`; with "auto" they are kept in float32 and multiplied as `dtype_on` says.
    Factors are made in float32 whatever it is, because a root lives by small eigenvalues, which bfloat16 rounds away.
    """
    make_layout = strip_layout if share_factors else block_layout
    layout = make_layout(max_preconditioner_dim, beta2, one_sided=one_sided)
    grafted = grafting == "adamw"
    base = adamw(beta1=beta1, beta2=beta2, eps=eps) if grafted else momentum(beta1)
    start = precondition_frequency if start_preconditioning_step == -1 else start_preconditioning_step
    power = exponent or (0.5 if one_sided else 0.25)

    def init(weight: Tensor) -> State:
        state, dtype = base.init(weight), DTYPES.get(matmul_dtype, torch.float32)
        for factor in layout.factors(weight.shape[1:]):
            state |= init_factor(factor, weight) | init_root(factor, weight, dtype)
        return state

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # step 1 is always seen, so that no root is made of nothing
        if (tick.step - 1) % statistics_every == 0:
            layout.observe(gradient, state, tick)

        # roots hold this step's gradient already, as in Meta's package
        since_start = tick.step - start - tick.offset
        is_due = (tick.step - tick.offset) % precondition_frequency == 0
        if since_start == 0 or (since_start > 0 and is_due):
            for factor in layout.factors(gradient.shape[1:]):
                refresh_root(factor, state, beta2, power, epsilon, tick.alive)

        # AdamW's moments go on from the first step: its direction is the step before the start, and its norm after it
        direction = base.update(gradient, state, tick)  # (R, M, N)
        if since_start < 0:
            return direction
        x = state["exp_avg"] if grafted else direction
        return layout.precondition(x.to(dtype_on(x.device, matmul_dtype)), direction, state, grafted)

    period = precondition_frequency if stagger_roots else 0
    return Transform(init, update, max_dim=adamw_above, period=period, reads_weight=False)


def dtype_on(device: torch.device, matmul_dtype: RootDtype) -> torch.dtype:
    """The type of this name; "auto" is bfloat16 on GPUs and on CPUs with instructions for it, float32 on others."""
    if matmul_dtype != "auto":
        return DTYPES[matmul_dtype]
    is_fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if is_fast else torch.float32
