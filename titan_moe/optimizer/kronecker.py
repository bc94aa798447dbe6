"""Kronecker factors of matrices, for Shampoo and SOAP: averages of G G^T and G^T G over steps, and their inverse roots.

In this order: how a matrix is cut into blocks; how a symmetric matrix is kept as its lower triangle; a factor, its
average and its root; and the two layouts.

A layout says which factors a matrix has, what they average and how their roots are applied. In that of blocks the
matrix is cut in both dimensions, and each block has a left and a right factor of its own (Shi et al., 2023). In that of
strips all blocks in one row of blocks share their left factor, and all in one column their right factor: these are the
diagonal blocks of the whole matrix' two factors. Strips are fewer than blocks, so that their roots and states cost
little; each sees more of the gradient; and their matrix products are long.

A state has each factor by its name, `left_0`, as a packed triangle (R, B, P), and with it `count_left_0` (R, B), the
number of gradients that it has seen. A gradient of zeros (an expert that got no token) is not counted, and the factor
stays as it is. Decaying it would not change its directions, but bias correction would take the lost weight for
evidence, and after many such steps the factor would round to zero and its inverse root blow up.

Shapes: R rows (experts), M x N a matrix, B blocks of a region or strips of one size, H x W a block, S the size of a
side, P = S (S + 1) / 2 numbers of a triangle.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titan_moe.norms import matrix_norms
from titan_moe.optimizer.transform import State, Tick

Side = Literal["left", "right"]


class Region(NamedTuple):
    """Blocks of one size that lie side by side: their rows and columns of the matrix, and the size of each block."""

    rows: slice
    cols: slice
    height: int
    width: int

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return (self.rows.stop - self.rows.start) // self.height * ((self.cols.stop - self.cols.start) // self.width)


def cut(size: int, max_dim: int) -> list[tuple[slice, int]]:
    """Cut a dimension as torch.split does: the range of all whole parts with their size, then that of a remainder."""
    whole = size // max_dim * max_dim
    parts = [(slice(0, whole), max_dim)] if whole else []
    return parts + ([(slice(whole, size), size - whole)] if whole < size else [])


def regions(matrix: Sequence[int], max_dim: int) -> list[Region]:
    """Cut both dimensions of a matrix of that shape: at most four regions, as each may have a remainder."""
    height, width = matrix
    return [Region(r, c, h, w) for r, h in cut(height, max_dim) for c, w in cut(width, max_dim)]


def grid(x: Tensor, region: Region) -> Tensor:
    """A view of the blocks of a region of (R, M, N), (R, rows of blocks, H, columns of blocks, W)."""
    part = x[:, region.rows, region.cols]
    return part.unflatten(2, (-1, region.width)).unflatten(1, (-1, region.height))


def to_blocks(x: Tensor, region: Region) -> Tensor:
    """(R, M, N) -> (R * B, H, W), a copy unless the region is one block."""
    return grid(x, region).transpose(2, 3).reshape(x.shape[0] * region.num_blocks, region.height, region.width)


def from_blocks(blocks: Tensor, region: Region, out: Tensor) -> None:
    """Write (R * B, H, W) to the region's place in `out` (R, M, N)."""
    target = grid(out, region).transpose(2, 3)  # (R, rows of blocks, columns of blocks, H, W)
    target.copy_(blocks.view(target.shape))


@functools.lru_cache(maxsize=64)
def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices that pack and unpack: of the triangle's elements in the square (P,), and the reverse (S * S,)."""
    row, col = torch.tril_indices(size, size, device=device)
    square = torch.empty(size, size, dtype=torch.int32, device=device)
    square[row, col] = square[col, row] = torch.arange(len(row), dtype=torch.int32, device=device)
    return (row * size + col).to(torch.int32), square.flatten()


def pack(symmetric: Tensor) -> Tensor:
    """(..., S, S) -> (..., P), the lower triangles."""
    index, _ = _triangle(symmetric.shape[-1], symmetric.device)
    return symmetric.flatten(-2).index_select(-1, index)


def unpack(triangle: Tensor, size: int) -> Tensor:
    """(..., P) -> (..., S, S)."""
    # A copy that is read in order brings the numbers into a CPU's cache before they are picked out of order, and in
    # float32 they are picked three times as fast as in bfloat16.
    packed = triangle.to(torch.float32, copy=True) if triangle.device.type == "cpu" else triangle
    _, index = _triangle(size, triangle.device)
    return packed.index_select(-1, index).unflatten(-1, (size, size)).to(triangle.dtype)


def packed_diagonal(triangle: Tensor, size: int) -> Tensor:
    """(..., P) -> (..., S)."""
    rows = torch.arange(1, size + 1, device=triangle.device)
    return triangle.index_select(-1, rows * (rows + 1) // 2 - 1)  # each row of the triangle ends on the diagonal


class Factor(NamedTuple):
    """Factors of one size: their name in a state, how many a matrix has, and their size."""

    name: str
    number: int
    size: int


def kept_sides(height: int, width: int, *, one_sided: bool) -> list[Side]:
    """Both sides, or with `one_sided` the shorter one."""
    if one_sided:
        return ["left" if height <= width else "right"]
    return ["left", "right"]


def init_factor(factor: Factor, weight: Tensor) -> State:
    """Zero factors, and zero counts, for a weight (R, M, N)."""
    shape = weight.shape[0], factor.number
    triangle = weight.new_zeros((*shape, factor.size * (factor.size + 1) // 2), dtype=torch.float32)
    return {f"count_{factor.name}": weight.new_zeros(shape, dtype=torch.float32), factor.name: triangle}


def add_product(factor: Factor, product: Tensor, state: State, beta2: float, tick: Tick) -> None:
    """F <- beta2 F + (1 - beta2) product; `product` is (R, B, S, S), or has its first two dimensions in one."""
    average, count = state[factor.name], state[f"count_{factor.name}"]  # (R, B, P), (R, B)
    new = pack(product).float().view(average.shape)  # (R, B, P)

    # a product of zero is no evidence: it is neither averaged nor counted
    seen = packed_diagonal(new, factor.size).sum(-1) > 0  # (R, B), the trace is |G|^2
    if tick.alive is not None:
        seen &= tick.alive[:, None]
    average.lerp_(new, ((1 - beta2) * seen).unsqueeze(-1))
    count += seen


def mean_factor(factor: Factor, state: State, beta2: float) -> Tensor:
    """The factor with its bias corrected, F / (1 - beta2^count), as squares (R, B, S, S)."""
    weight = 1 - beta2 ** state[f"count_{factor.name}"]  # (R, B)

    # one that has seen nothing is zero, and stays so
    packed = state[factor.name] / torch.where(weight > 0, weight, 1.0).unsqueeze(-1)
    return unpack(packed.flatten(0, 1), factor.size).unflatten(0, weight.shape)


def has_evidence(factor: Factor, state: State, alive: Tensor | None) -> Tensor:
    """Which blocks (R, B) have seen a gradient, of the rows that take part in this step."""
    seen = state[f"count_{factor.name}"] > 0
    return seen if alive is None else seen & alive[:, None]


def init_root(factor: Factor, weight: Tensor, dtype: torch.dtype) -> State:
    """The root before the first one: identities, as packed triangles."""
    eye = pack(torch.eye(factor.size, dtype=dtype, device=weight.device))
    return {f"root_{factor.name}": eye.expand(weight.shape[0], factor.number, -1).contiguous()}


def refresh_root(
    factor: Factor, state: State, beta2: float, exponent: float, epsilon: float, alive: Tensor | None
) -> None:
    """Compute the inverse root from the factor; it stays where no gradient was seen or a row is not `alive` (R,)."""
    old, seen = state[f"root_{factor.name}"], has_evidence(factor, state, alive)
    new = pack(inverse_root(mean_factor(factor, state, beta2), exponent, epsilon))
    old.copy_(torch.where(seen.unsqueeze(-1), new.to(old.dtype), old))


def root_of(factor: Factor, state: State, dtype: torch.dtype) -> Tensor:
    """The inverse root as squares (R, B, S, S), in the type in which it is to be multiplied."""
    packed = state[f"root_{factor.name}"]
    return unpack(packed.flatten(0, 1), factor.size).unflatten(0, packed.shape[:2]).to(dtype)


def inverse_root(factor: Tensor, exponent: float, epsilon: float) -> Tensor:
    """(A + epsilon I)^-exponent of symmetric (..., S, S); all eigenvalues are shifted if one is below epsilon.

    An eigenvalue so small that it may be round-off is raised to the most that round-off can make. The root then does
    not depend on its eigenvector, which differs between machines.
    """
    size = factor.shape[-1]
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
    values, vectors = torch.linalg.eigh(factor + epsilon * identity)
    values = values + (epsilon - values[..., :1]).clamp(min=0)

    # sums and eigh in fp32 add round-off of some sqrt(S) units of the largest eigenvalue
    floor = torch.finfo(torch.float32).eps * size**0.5
    values = values.maximum((floor * values[..., -1:]).clamp(min=epsilon))
    return vectors * values.pow(-exponent).unsqueeze(-2) @ vectors.mT


class Layout(NamedTuple):
    """Which factors a matrix has, and how they are fed and applied; all tensors are (R, M, N).

    `factors(shape)` are those of a matrix M x N. `observe(gradient, state, tick)` adds a gradient to the averages in a
    state. `precondition(x, direction, state, graft)` gives X_L x X_R from the roots in a state, with `graft` scaled
    block by block to the norms of `direction`. The result is in fp32 as `direction` is, which it may overwrite, and
    which may be the same tensor as x. Products are computed in the type of the gradient, and in that of x.
    """

    factors: Callable[[Sequence[int]], list[Factor]]
    observe: Callable[[Tensor, State, Tick], None]
    precondition: Callable[[Tensor, Tensor, State, bool], Tensor]


def block_layout(max_dim: int, beta2: float, *, one_sided: bool) -> Layout:
    """A factor for each side of each block."""

    by_region = functools.partial(factors_by_region, max_dim=max_dim, one_sided=one_sided)

    def factors(shape: Sequence[int]) -> list[Factor]:
        return [factor for _, sides in by_region(shape) for factor in sides.values()]

    def observe(gradient: Tensor, state: State, tick: Tick) -> None:
        for region, sides in by_region(gradient.shape[1:]):
            blocks = to_blocks(gradient, region)  # (R * B, H, W)
            for side, factor in sides.items():
                product = blocks @ blocks.mT if side == "left" else blocks.mT @ blocks  # (R * B, S, S)
                add_product(factor, product, state, beta2, tick)

    def precondition(x: Tensor, direction: Tensor, state: State, graft: bool) -> Tensor:
        for region, sides in by_region(x.shape[1:]):
            blocks = to_blocks(x, region)  # (R * B, H, W)
            for side, factor in sides.items():
                root = root_of(factor, state, x.dtype).flatten(0, 1)  # (R * B, S, S)
                blocks = root @ blocks if side == "left" else blocks @ root
            blocks = blocks.float()

            # each block takes the length that it has in `direction`, which is read before it is written over
            if graft:
                blocks *= quotient(block_norms(direction, region).flatten(), matrix_norms(blocks)).view(-1, 1, 1)
            if blocks.shape == x.shape:
                return blocks  # one block: no copy
            from_blocks(blocks, region, direction)
        return direction

    return Layout(factors, observe, precondition)


def strip_layout(max_dim: int, beta2: float, *, one_sided: bool) -> Layout:
    """A factor for each strip of rows and each strip of columns."""

    def by_side(shape: Sequence[int]) -> dict[Side, list[tuple[slice, Factor]]]:
        """On each side the strips of one size, and then those of a remainder: their range, and their factors."""
        lengths = {"left": shape[0], "right": shape[1]}
        return {
            side: [
                (span, Factor(f"{side}_{i}", (span.stop - span.start) // size, size))
                for i, (span, size) in enumerate(cut(lengths[side], max_dim))
            ]
            for side in kept_sides(*shape, one_sided=one_sided)
        }

    def factors(shape: Sequence[int]) -> list[Factor]:
        return [factor for spans in by_side(shape).values() for _, factor in spans]

    def observe(gradient: Tensor, state: State, tick: Tick) -> None:
        for side, spans in by_side(gradient.shape[1:]).items():
            for span, factor in spans:
                # a strip is read in its place: a tensor of all strips would be a copy of the gradient
                strips = strips_of(gradient, side, span, factor)
                products = [strip @ strip.mT if side == "left" else strip.mT @ strip for strip in strips]  # (R, S, S)
                add_product(factor, torch.stack(products, dim=1), state, beta2, tick)

    def precondition(x: Tensor, direction: Tensor, state: State, graft: bool) -> Tensor:
        # read before `direction` is written over: its memory takes the last product, since fresh memory costs more
        cells = regions(x.shape[1:], max_dim) if graft else []
        lengths = [block_norms(direction, region) for region in cells]  # (R, rows of blocks, columns of blocks) each

        # from one buffer into another, so that no product writes over what the next strip reads
        result, sides = x, by_side(x.shape[1:])
        for side in reversed(sides):  # the left one last: its strips are whole rows, which lie in one piece
            is_free = side == next(iter(sides)) and result.dtype == direction.dtype and result is not direction
            source, result = result, direction if is_free else torch.empty_like(result)  # (R, M, N)
            for span, factor in sides[side]:
                strips = (strips_of(y, side, span, factor) for y in (source, result))
                for root, old, new in zip(root_of(factor, state, x.dtype).unbind(1), *strips, strict=True):
                    torch.bmm(*((root, old) if side == "left" else (old, root)), out=new)
        if result.dtype != direction.dtype:
            result = direction.copy_(result)

        # each block takes the length that it had in `direction`
        for region, length in zip(cells, lengths, strict=True):
            scale = quotient(length, block_norms(result, region))
            grid(result, region).mul_(scale[:, :, None, :, None])
        return result

    return Layout(factors, observe, precondition)


def strips_of(x: Tensor, side: Side, span: slice, factor: Factor) -> Sequence[Tensor]:
    """Views of the strips of one size in a range: of rows (R, S, N) on the left, of columns (R, M, S) on the right."""
    dim = 1 if side == "left" else 2
    return x.narrow(dim, span.start, span.stop - span.start).split(factor.size, dim)


def factors_by_region(
    shape: Sequence[int], max_dim: int, *, one_sided: bool
) -> list[tuple[Region, dict[Side, Factor]]]:
    """The regions of a matrix cut into blocks, with the factors of each by side."""
    factors = []
    for index, region in enumerate(regions(shape, max_dim)):
        sizes: dict[Side, int] = {"left": region.height, "right": region.width}
        sides = kept_sides(region.height, region.width, one_sided=one_sided)
        factors.append((region, {side: Factor(f"{side}_{index}", region.num_blocks, sizes[side]) for side in sides}))
    return factors


def block_norms(x: Tensor, region: Region) -> Tensor:
    """Frobenius norms, in fp32, of the blocks of a region of (R, M, N): (R, rows of blocks, columns of blocks)."""
    row_norms = torch.linalg.vector_norm(grid(x, region), dim=4, dtype=torch.float32)
    return torch.linalg.vector_norm(row_norms, dim=2)


def quotient(length: Tensor, norm: Tensor) -> Tensor:
    """length / norm, and 0 where the norm is 0."""
    return torch.where(norm > 0, length / norm, 0.0)
