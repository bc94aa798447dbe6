"""Shampoo for each expert by itself: inverse roots of the two Kronecker factors of every block, AdamW's step size.

Gupta, Koren and Singer (2018), in the form of Distributed Shampoo (Shi et al., 2023, algorithm 2 with AdamW grafting):
per block of a matrix, with its gradient G, at its step t from 1,

    L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G
    X_L = (L / (1 - beta2^n) + epsilon I)^-exponent, X_R likewise, after n gradients, every
        `precondition_frequency` steps
    m, v as AdamW's; a = m' / (sqrt(v') + eps) with both bias-corrected
    P = X_L m' X_R |a| / |X_L m' X_R| (Frobenius norms) from `start_preconditioning_step` on, before it P = a
    W <- W - lr (P + weight_decay W)

Blocks side by side may share factors (`titan_moe.optimizer.layouts`): G is then a whole strip of the matrix.

Shapes: R rows (experts), M x N a matrix, B blocks of a region, H x W a block, S the size of a side.
"""

from typing import Literal

from torch import Tensor

from titan_moe.optimizer.factors import init_factor, init_root, refresh_root
from titan_moe.optimizer.layouts import block_layout, strip_layout
from titan_moe.optimizer.transform import State, Tick, Transform, adam, momentum
from titan_moe.runtime.dtypes import DTYPES

Grafting = Literal["adamw", "none"]


def shampoo_direction(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    epsilon: float,
    exponent: float,
    grafting: Grafting,
    precondition_frequency: int,
    start_preconditioning_step: int,
    statistics_every: int,
    max_preconditioner_dim: int,
    share_factors: bool,
    one_sided: bool,
    matmul_dtype: str,
    offset: int = 0,
) -> Transform:
    """The transform of the module's head; `offset` delays all its roots by as many steps.

    `exponent` 0 is 1/4 with two sides and 1/2 with one. With `grafting` "none" P = X_L m' X_R, the roots being
    identities before the first. Factors see the gradients of the steps 1, 1 + statistics_every, ...
    """
    make_layout = strip_layout if share_factors else block_layout
    dtype = DTYPES[matmul_dtype]
    layout = make_layout(max_preconditioner_dim, beta2, one_sided=one_sided, dtype=dtype)
    base = adam(beta1, beta2, eps) if grafting == "adamw" else momentum(beta1)
    start = (precondition_frequency if start_preconditioning_step == -1 else start_preconditioning_step) + offset
    power = exponent or (0.5 if one_sided else 0.25)

    def init(weight: Tensor) -> State:
        state = base.init(weight)
        for factor in layout.factors(weight.shape[1:]):
            state |= init_factor(factor, weight) | init_root(factor, weight, dtype)
        return state

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        since_start = tick.step - start
        if (tick.step - 1) % statistics_every == 0:
            layout.observe(gradient, state, tick)
        if since_start == 0 or (since_start > 0 and (tick.step - offset) % precondition_frequency == 0):
            for factor in layout.factors(gradient.shape[1:]):
                refresh_root(factor, state, beta2, power, epsilon, tick.alive)
        direction = base.update(gradient, state, tick)
        if since_start < 0:
            return direction
        graft = grafting == "adamw"
        return layout.precondition(state["exp_avg"] if graft else direction, direction, state, graft)

    return Transform(init, update)
