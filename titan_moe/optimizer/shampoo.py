"""Shampoo for each expert by itself: inverse roots of the two Kronecker factors of every block, AdamW's step size.

Gupta, Koren and Singer (2018), in the form of Distributed Shampoo (Shi et al., 2023, algorithm 2 with AdamW grafting):
per block of a matrix, with its gradient G, at its step t from 1,

    L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G
    X_L = (L / (1 - beta2^n) + epsilon I)^-exponent, X_R likewise, after n gradients, every
        `precondition_frequency` steps
    m, v as AdamW's; a = m' / (sqrt(v') + eps) with both bias-corrected
    P = X_L m' X_R |a| / |X_L m' X_R| (Frobenius norms) from `start_preconditioning_step` on, before it P = a
    W <- W - lr (P + weight_decay W)

Shapes: R rows (experts), M x N a matrix, B blocks of a region, H x W a block, S the size of a side.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_moe.optimizer.blocks import Region, from_blocks, grid, pack, regions, to_blocks, unpack
from titan_moe.optimizer.factors import (
    DTYPES,
    Factors,
    init_factors,
    inverse_root,
    mean_factor,
    observe,
    packed_identity,
    sides,
    size_of,
)
from titan_moe.optimizer.transform import State, Tick, Transform, adam, momentum

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
    one_sided: bool,
    matmul_dtype: str,
    offset: int = 0,
) -> Transform:
    """The transform of the module's head; `offset` delays all its roots by as many steps.

    `exponent` 0 is 1/4 with two sides and 1/2 with one. With `grafting` "none" P = X_L m' X_R, the roots being
    identities before the first. Factors see the gradients of the steps 1, 1 + statistics_every, ...
    """
    options = Factors(beta2, one_sided, DTYPES[matmul_dtype])
    base = adam(beta1, beta2, eps) if grafting == "adamw" else momentum(beta1)
    start = (precondition_frequency if start_preconditioning_step == -1 else start_preconditioning_step) + offset
    power = exponent or (0.5 if one_sided else 0.25)

    def init(weight: Tensor) -> State:
        state = base.init(weight)
        for index, region in enumerate(regions(weight.shape[1:], max_preconditioner_dim)):
            state |= init_factors(weight, index, region, options)
            for side in sides(region, one_sided):
                count, size = state[f"count_{index}"], size_of(side, region)
                packed_identity(state, f"root_{side}_{index}", count, size, options.dtype)
        return state

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        since_start = tick.step - start
        parts = list(enumerate(regions(gradient.shape[1:], max_preconditioner_dim)))
        for index, region in parts:
            if (tick.step - 1) % statistics_every == 0:
                observe(gradient, state, index, region, options, tick)
            if since_start == 0 or (since_start > 0 and (tick.step - offset) % precondition_frequency == 0):
                refresh_roots(state, index, region, options, power, epsilon)
        direction = base.update(gradient, state, tick)
        if since_start < 0:
            return direction
        for index, region in parts:
            blocks = precondition(direction, state, index, region, graft=grafting == "adamw")
            if blocks.shape == direction.shape:
                return blocks  # one block: no copy
            from_blocks(blocks, region, direction)
        return direction

    return Transform(init, update)


def refresh_roots(state: State, index: int, region: Region, options: Factors, exponent: float, epsilon: float) -> None:
    """Compute a region's inverse roots from its factors; a block that has seen no gradient yet keeps its identity."""
    seen = (state[f"count_{index}"] > 0).unsqueeze(-1)
    for side in sides(region, options.one_sided):
        root = inverse_root(mean_factor(state, side, index, region, options.beta2), exponent, epsilon)
        old = state[f"root_{side}_{index}"]
        old.copy_(torch.where(seen, pack(root).view(old.shape).to(old.dtype), old))


def precondition(direction: Tensor, state: State, index: int, region: Region, *, graft: bool) -> Tensor:
    """The preconditioned momentum of a region, (R * B, H, W), with the norm that each block has in `direction`.

    Without `graft` the direction is the momentum, and it is preconditioned as it is.
    """
    blocks = to_blocks(state["exp_avg"] if graft else direction, region)
    for side in ("left", "right"):
        packed = state.get(f"root_{side}_{index}")
        if packed is None:
            continue
        root = unpack(packed.flatten(0, 1), size_of(side, region))
        blocks = blocks.to(root.dtype)
        blocks = root @ blocks if side == "left" else blocks @ root
    blocks = blocks.float()
    if graft:
        rows = torch.linalg.vector_norm(grid(direction, region), dim=4)
        length = torch.linalg.vector_norm(rows, dim=2).view(-1, 1, 1)
        norm = torch.linalg.vector_norm(blocks, dim=(1, 2), keepdim=True)
        blocks *= torch.where(norm > 0, length / norm, 0.0)
    return blocks
