"""SOAP for each expert by itself: Adam in the eigenbasis of Shampoo's factors (Vyas et al., 2024, algorithm 3).

Per block, G' = Q_L^T G Q_R, Adam's moments and direction a of G', P = Q_L a Q_R^T. The factors see the gradient
afterwards, and every `precondition_frequency` steps the bases follow them by one step of orthogonal iteration (their
algorithm 4). The first step only makes the bases, from the eigenvectors of its gradient's factors, as the authors' code
does: in its own eigenbasis a gradient is diagonal, and Adam would enlarge the round-off beside the diagonal.

Shapes: R rows (experts), M x N a matrix, B blocks of a region, H x W a block, S the size of a side.
"""

import torch
from torch import Tensor

from titan_moe.optimizer.blocks import Region, from_blocks, regions, to_blocks
from titan_moe.optimizer.factors import (
    DTYPES,
    Factors,
    Side,
    init_factors,
    mean_factor,
    observe,
    sides,
    size_of,
)
from titan_moe.optimizer.transform import State, Tick, Transform, adam

MOMENTS = ("exp_avg", "exp_avg_sq")


def soap_direction(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    precondition_frequency: int,
    statistics_every: int,
    max_preconditioner_dim: int,
    one_sided: bool,
    matmul_dtype: str,
    offset: int = 0,
) -> Transform:
    """The transform of the module's head; `offset` delays the changes of its bases by as many steps.

    With `one_sided` only the shorter side of a block is rotated. The moments are kept in the rotated coordinates.
    """
    options = Factors(beta2, one_sided, DTYPES[matmul_dtype])
    base = adam(beta1, beta2, eps)

    def init(weight: Tensor) -> State:
        state = base.init(weight)
        for index, region in enumerate(regions(weight.shape[1:], max_preconditioner_dim)):
            state |= init_factors(weight, index, region, options)
            for side in sides(region, one_sided):
                eye = torch.eye(size_of(side, region), dtype=torch.float32, device=weight.device)
                state[f"basis_{side}_{index}"] = eye.repeat(*state[f"count_{index}"].shape, 1, 1)
        return state

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        parts = list(enumerate(regions(gradient.shape[1:], max_preconditioner_dim)))
        if tick.step == 1:
            for index, region in parts:
                observe(gradient, state, index, region, options, tick)
                for side in sides(region, one_sided):
                    first_basis(state, side, index, region, beta2)
            return torch.zeros_like(gradient)
        due = (tick.step - offset) % precondition_frequency == 0
        rotated = torch.empty_like(gradient)
        for index, region in parts:
            from_blocks(rotate(to_blocks(gradient, region), state, index, options), region, rotated)
        direction = base.update(rotated, state, tick._replace(steps=(tick.steps - 1).clamp(min=1)))
        for index, region in parts:
            back = rotate(to_blocks(direction, region), state, index, options, back=True)
            from_blocks(back, region, direction)
            if (tick.step - 1) % statistics_every == 0:
                observe(gradient, state, index, region, options, tick)
            for side in sides(region, one_sided) if due else []:
                turn_basis(state, side, index, region, beta2)
        return direction

    return Transform(init, update)


def rotate(blocks: Tensor, state: State, index: int, options: Factors, *, back: bool = False) -> Tensor:
    """(R * B, H, W) into the eigenbasis of a region's blocks, Q_L^T G Q_R, or back from it, Q_L G Q_R^T."""

    def basis(side: Side) -> Tensor | None:
        found = state.get(f"basis_{side}_{index}")
        return None if found is None else found.flatten(0, 1).to(options.dtype)

    left, right = basis("left"), basis("right")
    if back:
        right = None if right is None else right.mT
    else:
        left = None if left is None else left.mT
    product = blocks.to(options.dtype)
    product = product if left is None else left @ product
    return (product if right is None else product @ right).float()


def first_basis(state: State, side: Side, index: int, region: Region, beta2: float) -> None:
    """Make a side's basis the eigenvectors of its factor, largest eigenvalue first."""
    old = state[f"basis_{side}_{index}"]
    _, vectors = torch.linalg.eigh(mean_factor(state, side, index, region, beta2))
    seen = (state[f"count_{index}"] > 0)[..., None, None]
    old.copy_(torch.where(seen, vectors.flip(-1).view_as(old), old))


def turn_basis(state: State, side: Side, index: int, region: Region, beta2: float) -> None:
    """Move a side's basis by one step of orthogonal iteration on its factor, and the moments with it.

    The first moment is turned exactly. The second moment keeps its coordinates, which are put in the order of the
    basis' eigenvalue estimates. A block that has seen no gradient stays as it is.
    """
    old = state[f"basis_{side}_{index}"]
    factor = mean_factor(state, side, index, region, beta2).view_as(old)
    product = factor @ old
    order = (old * product).sum(-2).argsort(dim=-1, descending=True, stable=True)  # diag(Q^T F Q)
    identity = torch.arange(old.shape[-1], device=old.device)
    seen = (state[f"count_{index}"] > 0).unsqueeze(-1)
    order = torch.where(seen, order, identity)
    new = torch.linalg.qr(product.gather(-1, order.unsqueeze(-2).expand_as(product))).Q
    new = torch.where(seen.unsqueeze(-1), new, old)
    turn = (new.mT @ old).flatten(0, 1)
    mean, square = (to_blocks(state[name], region) for name in MOMENTS)
    chosen = order.flatten(0, 1)
    if side == "left":
        mean = turn @ mean
        square = square.gather(1, chosen.unsqueeze(-1).expand_as(square))
    else:
        mean = mean @ turn.mT
        square = square.gather(2, chosen.unsqueeze(-2).expand_as(square))
    from_blocks(mean, region, state["exp_avg"])
    from_blocks(square, region, state["exp_avg_sq"])
    old.copy_(new)
