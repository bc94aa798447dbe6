"""Matrices cut into blocks of a greatest size, and symmetric matrices stored as their lower triangle.

Shapes: R rows of a stacked tensor, M x N its matrices, B blocks of one size H x W, P = S (S + 1) / 2 of a triangle.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Region(NamedTuple):
    """Blocks of one size that lie side by side: where they are in the matrix, and the size of each."""

    rows: slice
    cols: slice
    height: int
    width: int

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return (self.rows.stop - self.rows.start) // self.height * ((self.cols.stop - self.cols.start) // self.width)


def cut(size: int, max_dim: int) -> list[tuple[slice, int]]:
    """Cut a dimension as torch.split does: where the whole parts lie and their size, and the same of a remainder."""
    whole = size // max_dim * max_dim
    parts = [(slice(0, whole), max_dim)] if whole else []
    return parts + ([(slice(whole, size), size - whole)] if whole < size else [])


def regions(matrix: Sequence[int], max_dim: int) -> list[Region]:
    """Cut both dimensions of a matrix of that shape: at most four regions, the last of remainders."""
    height, width = matrix
    return [Region(r, c, h, w) for r, h in cut(height, max_dim) for c, w in cut(width, max_dim)]


def grid(x: Tensor, region: Region) -> Tensor:
    """The blocks of a region of (R, M, N) where they lie, a view (R, rows of blocks, H, columns of blocks, W)."""
    part = x[:, region.rows, region.cols]
    return part.unflatten(2, (-1, region.width)).unflatten(1, (-1, region.height))


def to_blocks(x: Tensor, region: Region) -> Tensor:
    """(R, M, N) -> (R * B, H, W), a copy unless the region is one block."""
    return grid(x, region).transpose(2, 3).reshape(x.shape[0] * region.num_blocks, region.height, region.width)


def from_blocks(blocks: Tensor, region: Region, out: Tensor) -> None:
    """Write (R * B, H, W) to its place in `out` (R, M, N)."""
    target = grid(out, region).transpose(2, 3)
    target.copy_(blocks.view(target.shape))


@functools.lru_cache(maxsize=64)
def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each element of the triangle is in the square, (P,), and each of the square in the triangle, (S * S,)."""
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
    _, index = _triangle(size, triangle.device)
    return triangle.index_select(-1, index).unflatten(-1, (size, size))


def packed_diagonal(triangle: Tensor, size: int) -> Tensor:
    """(..., P) -> (..., S)."""
    steps = torch.arange(1, size + 1, device=triangle.device)
    return triangle.index_select(-1, steps * (steps + 1) // 2 - 1)
