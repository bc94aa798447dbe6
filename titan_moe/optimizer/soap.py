"""SOAP for each expert by itself: Adam in the eigenbasis of Shampoo's factors (Vyas et al., 2024, algorithm 3).

Per block, G' = Q_L^T G Q_R, Adam's moments and direction a of G', P = Q_L a Q_R^T. The factors see the gradient
afterwards, and every `precondition_frequency` steps the bases follow them by one step of orthogonal iteration (their
algorithm 4). The first step only makes the bases, from the eigenvectors of its gradient's factors, as the authors' code
does: in its own eigenbasis a gradient is diagonal, and Adam would enlarge the round-off beside the diagonal.

Shapes: R rows (experts), M x N a matrix, B blocks of a region, H x W a block, S the size of a side.
"""

import torch
from torch import Tensor

from titan_moe.optimizer.blocks import Region, from_blocks, to_blocks
from titan_moe.optimizer.factors import DTYPES, Factor, Side, init_factor, mean_factor
from titan_moe.optimizer.layouts import block_layout, factors_by_region
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
    dtype = DTYPES[matmul_dtype]
    layout = block_layout(max_preconditioner_dim, beta2, one_sided=one_sided, dtype=dtype)
    base = adam(beta1, beta2, eps)

    def init(weight: Tensor) -> State:
        state = base.init(weight)
        for factor in layout.factors(weight.shape[1:]):
            eye = torch.eye(factor.size, dtype=torch.float32, device=weight.device)
            state |= init_factor(factor, weight)
            state[f"basis_{factor.name}"] = eye.repeat(weight.shape[0], factor.number, 1, 1)
        return state

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        shape = gradient.shape[1:]
        if tick.step == 1:
            layout.observe(gradient, state, tick)
            for factor in layout.factors(shape):
                first_basis(factor, state, beta2)
            return torch.zeros_like(gradient)
        due = (tick.step - offset) % precondition_frequency == 0
        parts = factors_by_region(shape, max_preconditioner_dim, one_sided=one_sided)
        rotated = torch.empty_like(gradient)
        for region, factors in parts:
            from_blocks(rotate(to_blocks(gradient, region), factors, state, dtype), region, rotated)
        direction = base.update(rotated, state, tick._replace(steps=(tick.steps - 1).clamp(min=1)))
        for region, factors in parts:
            back = rotate(to_blocks(direction, region), factors, state, dtype, back=True)
            from_blocks(back, region, direction)
        if (tick.step - 1) % statistics_every == 0:
            layout.observe(gradient, state, tick)
        for region, factors in parts if due else []:
            for side, factor in factors.items():
                turn_basis(side, factor, region, state, beta2)
        return direction

    return Transform(init, update)


def rotate(
    blocks: Tensor, factors: dict[Side, Factor], state: State, dtype: torch.dtype, *, back: bool = False
) -> Tensor:
    """(R * B, H, W) into the eigenbasis of a region's blocks, Q_L^T G Q_R, or back from it, Q_L G Q_R^T."""
    product = blocks.to(dtype)
    for side, factor in factors.items():
        basis = state[f"basis_{factor.name}"].flatten(0, 1).to(dtype)
        if side == "left":
            product = (basis if back else basis.mT) @ product
        else:
            product = product @ (basis.mT if back else basis)
    return product.float()


def first_basis(factor: Factor, state: State, beta2: float) -> None:
    """Make the basis the eigenvectors of its factor, largest eigenvalue first."""
    old = state[f"basis_{factor.name}"]
    _, vectors = torch.linalg.eigh(mean_factor(factor, state, beta2))
    seen = (state[f"count_{factor.name}"] > 0)[..., None, None]
    old.copy_(torch.where(seen, vectors.flip(-1), old))


def turn_basis(side: Side, factor: Factor, region: Region, state: State, beta2: float) -> None:
    """Move a side's basis by one step of orthogonal iteration on its factor, and the moments with it.

    The first moment is turned exactly. The second moment keeps its coordinates, which are put in the order of the
    basis' eigenvalue estimates. A block that has seen no gradient stays as it is.
    """
    old = state[f"basis_{factor.name}"]
    product = mean_factor(factor, state, beta2) @ old
    order = (old * product).sum(-2).argsort(dim=-1, descending=True, stable=True)  # diag(Q^T F Q)
    identity = torch.arange(old.shape[-1], device=old.device)
    seen = (state[f"count_{factor.name}"] > 0).unsqueeze(-1)
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
