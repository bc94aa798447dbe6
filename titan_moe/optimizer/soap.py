"""SOAP for each expert by itself: Adam in the eigenbasis of Shampoo's factors (Vyas et al., 2024, algorithm 3).

In each block the gradient is rotated, G' = Q_L^T G Q_R; Adam has its moments of G' and makes a direction a of them; the
step is P = Q_L a Q_R^T. The factors see the gradient afterwards. Every `precondition_frequency` steps the bases Q
follow the factors by one step of orthogonal iteration (their algorithm 4). The first step has no direction: it
only makes the bases, from the eigenvectors of its gradient's factors, as the authors' code does. In its own eigenbasis
a gradient is diagonal, and Adam would enlarge the round-off beside the diagonal.

Factors have low rank while an expert has seen fewer tokens than its sides are long. The eigenvectors of the empty part
are round-off, which differs between machines. Adam would carry it into the weights, because its step along a small
gradient is as long as along a large one. So an eigenvector whose eigenvalue is round-off is not used. In its place the
first basis takes a fixed direction, made orthogonal to those with evidence, and a later basis keeps the direction it
had before. A coordinate in which the gradient is only the round-off of its rotation is not updated.

Shapes: R rows (experts), M x N a matrix, B blocks of a region, H x W a block, S the size of a side.
"""

import torch
from torch import Tensor

from titan_moe.optimizer.kronecker import (
    Factor,
    Region,
    Side,
    block_layout,
    factors_by_region,
    from_blocks,
    has_evidence,
    init_factor,
    mean_factor,
    to_blocks,
)
from titan_moe.optimizer.rounding import mixed
from titan_moe.optimizer.transform import MOMENTS, MatmulDtype, State, Tick, Transform, adamw
from titan_moe.runtime.dtypes import DTYPES

EVIDENT = 1e-5  # a part of a gradient that is smaller than this may be the round-off of the whole in fp32


def soap(
    *,
    beta1: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    precondition_frequency: int = 10,
    statistics_every: int = 1,
    max_preconditioner_dim: int = 1024,
    adamw_above: int = 8192,
    one_sided: bool = False,
    matmul_dtype: MatmulDtype = "float32",
    stagger_roots: bool = False,
) -> Transform:
    """SOAP, Adam in the eigenbasis of Shampoo's factors, each expert by itself (Vyas et al., 2024).

    The bases follow the factors every `precondition_frequency` steps by one step of orthogonal iteration; the other
    arguments are shampoo's. With `one_sided` only the shorter side of a block is rotated. The moments are kept in the
    rotated coordinates.
    """
    dtype = DTYPES[matmul_dtype]
    floor = max(EVIDENT, torch.finfo(dtype).eps / 8)
    layout = block_layout(max_preconditioner_dim, beta2, one_sided=one_sided)
    base = adamw(beta1=beta1, beta2=beta2, eps=eps)

    def init(weight: Tensor) -> State:
        state = base.init(weight) | {"moment_steps": weight.new_zeros(weight.shape[0], dtype=torch.float32)}
        for factor in layout.factors(weight.shape[1:]):
            eye = torch.eye(factor.size, dtype=torch.float32, device=weight.device)
            state |= init_factor(factor, weight)
            state[f"basis_{factor.name}"] = eye.repeat(weight.shape[0], factor.number, 1, 1)
        return state

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # the first gradient only makes the bases: in its own eigenbasis it is diagonal, and the rest is round-off
        parts = factors_by_region(gradient.shape[1:], max_preconditioner_dim, one_sided=one_sided)
        if tick.step == 1:
            layout.observe(gradient.to(dtype), state, tick)
            for region, factors in parts:
                for side, factor in factors.items():
                    first_basis(side, factor, to_blocks(gradient, region), state)
            return torch.zeros_like(gradient)

        # Bias correction goes by what the moments have seen: not the first step, and of a row only those with tokens.
        state["moment_steps"] += 1 if tick.alive is None else tick.alive

        # Adam's step in the rotated coordinates, and back
        rotated = torch.empty_like(gradient)  # (R, M, N)
        for region, factors in parts:
            from_blocks(rotate(to_blocks(gradient, region), factors, state, dtype), region, rotated)
        direction = base.update(rotated, state, tick._replace(steps=state["moment_steps"].clamp(min=1)))
        for region, factors in parts:
            blocks = without_round_off(to_blocks(direction, region), to_blocks(state["exp_avg_sq"], region))
            from_blocks(rotate(blocks, factors, state, dtype, back=True), region, direction)

        # the factors see this gradient after it was used, so that a step depends on the ones before it alone
        if (tick.step - 1) % statistics_every == 0:
            layout.observe(gradient.to(dtype), state, tick)
        if (tick.step - tick.offset) % precondition_frequency == 0:
            for region, factors in parts:
                for side, factor in factors.items():
                    turn_basis(side, factor, region, state, beta2, floor, tick.alive)
        return direction

    period = precondition_frequency if stagger_roots else 0
    return Transform(init, update, max_dim=adamw_above, period=period, reads_weight=False)


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


def without_round_off(direction: Tensor, square: Tensor) -> Tensor:
    """Adam's direction in blocks (R * B, H, W), with 0 where the gradient may be only the round-off of its rotation.

    That is where its root mean square, by Adam's second moment `square`, is below EVIDENT of the whole block's.
    """
    return torch.where(square > EVIDENT**2 * square.mean((1, 2), keepdim=True), direction, 0.0)


def first_basis(side: Side, factor: Factor, blocks: Tensor, state: State) -> None:
    """Make a side's basis of the first gradient's singular vectors, largest first, and for the rest fixed directions.

    `blocks` (R * B, H, W) are the gradient's; singular values up to EVIDENT of the largest are no evidence.
    """
    old = state[f"basis_{factor.name}"]  # (R, B, S, S)

    # in double precision: products in single precision would lose all singular values below 0.001 of the largest
    exact = blocks.double()
    values, vectors = torch.linalg.eigh(exact @ exact.mT if side == "left" else exact.mT @ exact)
    values, vectors = values.flip(-1), vectors.flip(-1)  # (R * B, S), (R * B, S, S), largest first

    # What QR leaves of the fixed directions depends only on the space of the evident vectors, not on each of them.
    # Random directions are never inside that space; an axis can be, where inputs are always zero.
    fixed = hashed_numbers(factor.size, vectors)  # (S, S)
    evident = (values > EVIDENT**2 * values[..., :1]).unsqueeze(-2)
    basis = torch.linalg.qr(torch.where(evident, vectors, fixed)).Q

    # an expert without a token has no gradient to make a basis of, and keeps the identity
    seen = (state[f"count_{factor.name}"] > 0)[..., None, None]
    old.copy_(torch.where(seen, basis.view(old.shape), old))


def hashed_numbers(size: int, like: Tensor) -> Tensor:
    """(S, S) numbers in [-0.5, 0.5), the same on every device: hashes of their indices by integers, which are exact."""
    number = mixed(torch.arange(size * size, device=like.device))
    return (number.to(like.dtype) / 2**32 - 0.5).view(size, size)


def turn_basis(
    side: Side, factor: Factor, region: Region, state: State, beta2: float, floor: float, alive: Tensor | None
) -> None:
    """Move a side's basis by one step of orthogonal iteration on its factor, and the moments with it.

    The first moment is turned exactly. The second moment keeps its coordinates, which are put in the order of the
    basis' eigenvalue estimates. A block that has seen no gradient, or whose row is not `alive` (R,), stays as it is.
    """
    old = state[f"basis_{factor.name}"]  # (R, B, S, S)
    new, order = iterate(mean_factor(factor, state, beta2), old, floor)  # (R, B, S, S), (R, B, S)

    # by a choice and not by indices of what moves, whose number the host would have to wait for
    moves = has_evidence(factor, state, alive)  # (R, B)
    new = torch.where(moves[..., None, None], new, old)
    order = torch.where(moves.unsqueeze(-1), order, torch.arange(factor.size, device=old.device))

    # the moments move with the basis; what stays is not multiplied by Q^T Q, which is one to round-off only
    turn, chosen = (new.mT @ old).flatten(0, 1), order.flatten(0, 1)  # (R * B, S, S), (R * B, S)
    mean, square = (to_blocks(state[name], region) for name in MOMENTS)  # (R * B, H, W)
    if side == "left":
        turned = turn @ mean
        square = square.gather(1, chosen.unsqueeze(-1).expand_as(square))
    else:
        turned = mean @ turn.mT
        square = square.gather(2, chosen.unsqueeze(-2).expand_as(square))
    from_blocks(torch.where(moves.view(-1, 1, 1), turned, mean), region, state["exp_avg"])
    from_blocks(square, region, state["exp_avg_sq"])
    old.copy_(new)


def iterate(factor: Tensor, basis: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from a basis (..., S, S) on a factor of that shape.

    Returns the new basis, and (..., S) which column of the old one each of its columns comes from.
    """
    # the largest eigenvalue estimates first: QR turns each column away from those before it, and leaves the first alone
    product = factor @ basis  # (..., S, S)
    order = (basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)  # diag(Q^T F Q)

    # Where the factor has fewer directions than columns, a column adds round-off to those before it, and the basis
    # would be made of it. Such columns go last and keep the old direction, as far as the others leave it. The round-off
    # is that of the factor, and of the column times what the columns before it had to be enlarged by, 100 at most.
    columns = take_columns(product, order)
    added = torch.linalg.qr(columns, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    norms = torch.linalg.vector_norm(columns, dim=-2)
    evident = added > floor * torch.maximum(added.amax(-1, keepdim=True), 100 * norms)
    last = (~evident).int().argsort(dim=-1, stable=True)
    order, evident = order.gather(-1, last), evident.gather(-1, last)
    columns = torch.where(evident.unsqueeze(-2), take_columns(columns, last), take_columns(basis, order))
    return torch.linalg.qr(columns).Q, order


def take_columns(x: Tensor, order: Tensor) -> Tensor:
    """The columns of (..., S, S) in an order (..., S)."""
    return x.gather(-1, order.unsqueeze(-2).expand_as(x))
