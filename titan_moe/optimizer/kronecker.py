"""Which factors a matrix has, what they average, and how their roots are applied.

Two layouts of a matrix that is larger than the greatest factor. Blocks: it is cut in both dimensions, and each block
has a left and a right factor of its own (Shi et al., 2023). Strips: all blocks in a row of blocks share their left
factor, and all in a column their right one, which are then the diagonal blocks of the whole matrix' two factors. Strips
are fewer, so that their roots and states cost little; each sees more of the gradient; and their products are long.

Shapes: R rows (experts), M x N a matrix, B blocks of a region or strips of a size, H x W a block, S the size of a side.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.norms import matrix_norms
from titan_moe.optimizer.blocks import Region, cut, from_blocks, grid, regions, to_blocks
from titan_moe.optimizer.factors import Factor, Side, add_product, kept_sides, root_of
from titan_moe.optimizer.transform import State, Tick


class Layout(NamedTuple):
    """`factors(shape)` of a matrix M x N; `observe` adds a gradient (R, M, N) to the averages in a state.

    `precondition(x, direction, state, graft)` gives X_L x X_R from the roots in a state, with `graft` scaled to the
    norm of `direction`, which it may overwrite; x, which may be the same tensor, and direction are (R, M, N) in fp32.
    """

    factors: Callable[[Sequence[int]], list[Factor]]
    observe: Callable[[Tensor, State, Tick], None]
    precondition: Callable[[Tensor, Tensor, State, bool], Tensor]


def block_layout(max_dim: int, beta2: float, *, one_sided: bool, dtype: torch.dtype) -> Layout:
    """A factor for each side of each block; the norm of a step is grafted block by block."""

    by_region = partial(factors_by_region, max_dim=max_dim, one_sided=one_sided)

    def factors(shape: Sequence[int]) -> list[Factor]:
        return [factor for _, found in by_region(shape) for factor in found.values()]

    def observe(gradient: Tensor, state: State, tick: Tick) -> None:
        for region, found in by_region(gradient.shape[1:]):
            blocks = to_blocks(gradient, region).to(dtype)
            for side, factor in found.items():
                product = blocks @ blocks.mT if side == "left" else blocks.mT @ blocks
                add_product(factor, product, state, beta2, tick)

    def precondition(x: Tensor, direction: Tensor, state: State, graft: bool) -> Tensor:
        for region, found in by_region(x.shape[1:]):
            blocks = to_blocks(x, region).to(dtype)
            for side, factor in found.items():
                root = root_of(factor, state).flatten(0, 1)
                blocks = root @ blocks if side == "left" else blocks @ root
            blocks = blocks.float()
            if graft:
                blocks *= quotient(block_norms(direction, region).flatten(), matrix_norms(blocks)).view(-1, 1, 1)
            if blocks.shape == x.shape:
                return blocks  # one block: no copy
            from_blocks(blocks, region, direction)
        return direction

    return Layout(factors, observe, precondition)


def strip_layout(max_dim: int, beta2: float, *, one_sided: bool, dtype: torch.dtype) -> Layout:
    """A factor for each strip of rows and of columns; the norm of a step is grafted block by block as there."""

    def by_side(shape: Sequence[int]) -> dict[Side, list[tuple[slice, Factor]]]:
        lengths = {"left": shape[0], "right": shape[1]}
        return {
            side: [
                (where, Factor(f"{side}_{i}", (where.stop - where.start) // size, size))
                for i, (where, size) in enumerate(cut(lengths[side], max_dim))
            ]
            for side in kept_sides(*shape, one_sided=one_sided)
        }

    def factors(shape: Sequence[int]) -> list[Factor]:
        return [factor for found in by_side(shape).values() for _, factor in found]

    def observe(gradient: Tensor, state: State, tick: Tick) -> None:
        gradient = gradient.to(dtype)
        for side, found in by_side(gradient.shape[1:]).items():
            for where, factor in found:
                strips = strips_of(gradient, side, where, factor)
                products = [strip @ strip.mT if side == "left" else strip.mT @ strip for strip in strips]
                add_product(factor, torch.stack(products, dim=1), state, beta2, tick)

    def precondition(x: Tensor, direction: Tensor, state: State, graft: bool) -> Tensor:
        result, sides = x.to(dtype), by_side(x.shape[1:])
        for side in reversed(sides):  # the left one last, whose strips are whole rows
            source, result = result, torch.empty_like(result)
            for where, factor in sides[side]:
                strips = (strips_of(y, side, where, factor) for y in (source, result, direction))
                for root, old, new, own in zip(root_of(factor, state).unbind(1), *strips, strict=True):
                    torch.bmm(*((root, old) if side == "left" else (old, root)), out=new)
                    if graft and side == next(iter(sides)):
                        take_norms(new, own, max_dim)  # now, while the strip is in the cache
        return result.float()

    return Layout(factors, observe, precondition)


def strips_of(x: Tensor, side: Side, where: slice, factor: Factor) -> Sequence[Tensor]:
    """Views of the strips of one size: of rows (R, S, N) on the left, of columns (R, M, S) on the right."""
    dim = 1 if side == "left" else 2
    return x.narrow(dim, where.start, where.stop - where.start).split(factor.size, dim)


def factors_by_region(
    shape: Sequence[int], max_dim: int, *, one_sided: bool
) -> list[tuple[Region, dict[Side, Factor]]]:
    """The regions of a matrix cut into blocks, with the factors of each by side."""
    found = []
    for index, region in enumerate(regions(shape, max_dim)):
        sizes: dict[Side, int] = {"left": region.height, "right": region.width}
        sides = kept_sides(region.height, region.width, one_sided=one_sided)
        found.append((region, {side: Factor(f"{side}_{index}", region.num_blocks, sizes[side]) for side in sides}))
    return found


def take_norms(x: Tensor, other: Tensor, max_dim: int) -> None:
    """Scale each block of x (R, M, N) to the norm that it has in `other`."""
    for region in regions(x.shape[1:], max_dim):
        scale = quotient(block_norms(other, region), block_norms(x, region))
        grid(x, region).mul_(scale[:, :, None, :, None])


def block_norms(x: Tensor, region: Region) -> Tensor:
    """Frobenius norms, in fp32, of the blocks of a region of (R, M, N): (R, rows of blocks, columns of blocks)."""
    rows = torch.linalg.vector_norm(grid(x, region), dim=4, dtype=torch.float32)
    return torch.linalg.vector_norm(rows, dim=2)


def quotient(length: Tensor, norm: Tensor) -> Tensor:
    """length / norm, and 0 where the norm is."""
    return torch.where(norm > 0, length / norm, 0.0)
