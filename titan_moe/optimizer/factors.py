"""Kronecker factors of blocks of a gradient: their statistics, inverse roots and eigenbases, batched over experts.

A block G (H x W) has a left factor, an average of G G^T, and a right one, of G^T G. In a state they are packed
triangles (R, B, P) by the name of their side and region, `left_0`, with `count_0` (R, B): how many gradients they have
seen. A block whose gradient is exactly zero (an expert that got no token) is not counted and its factors stay as they
are: decaying them would not change their directions, but bias correction would take the lost weight for evidence, and
after many such steps the factor would round to zero and its inverse root blow up.

Shapes: R rows (experts), B blocks of a region, H x W a block, S the size of a side, P = S (S + 1) / 2.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titan_moe.optimizer.blocks import Region, pack, packed_diagonal, to_blocks, unpack
from titan_moe.optimizer.transform import State, Tick

Side = Literal["left", "right"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Factors(NamedTuple):
    """Which factors a transform keeps and how their products are computed."""

    beta2: float
    one_sided: bool
    dtype: torch.dtype


def sides(region: Region, one_sided: bool) -> list[Side]:
    """Both sides, or with `one_sided` the shorter one of the block."""
    if one_sided:
        return ["left" if region.height <= region.width else "right"]
    return ["left", "right"]


def size_of(side: Side, region: Region) -> int:
    """Length of a block's side."""
    return region.height if side == "left" else region.width


def init_factors(weight: Tensor, index: int, region: Region, options: Factors) -> State:
    """Zero factors and counts of region number `index`."""
    shape = weight.shape[0], region.num_blocks
    state = {f"count_{index}": weight.new_zeros(shape, dtype=torch.float32)}
    for side in sides(region, options.one_sided):
        size = size_of(side, region)
        state[f"{side}_{index}"] = weight.new_zeros((*shape, size * (size + 1) // 2), dtype=torch.float32)
    return state


def observe(gradient: Tensor, state: State, index: int, region: Region, options: Factors, tick: Tick) -> None:
    """Add this step's gradient (R, M, N) to the averages of a region: F <- beta2 F + (1 - beta2) G G^T."""
    blocks = to_blocks(gradient, region).to(options.dtype)
    count = state[f"count_{index}"]
    seen: Tensor | None = None
    for side in sides(region, options.one_sided):
        product = blocks @ blocks.mT if side == "left" else blocks.mT @ blocks
        new = pack(product).float().view(*count.shape, -1)
        if seen is None:
            squares = packed_diagonal(new, size_of(side, region)).sum(-1)  # |G|^2 of each block
            seen = squares > 0 if tick.alive is None else (squares > 0) & tick.alive[:, None]
        state[f"{side}_{index}"].lerp_(new, ((1 - options.beta2) * seen).unsqueeze(-1))
    assert seen is not None
    count += seen


def mean_factor(state: State, side: Side, index: int, region: Region, beta2: float) -> Tensor:
    """The factor with its bias corrected, F / (1 - beta2^count), as squares (R * B, S, S)."""
    weight = 1 - beta2 ** state[f"count_{index}"]
    packed = state[f"{side}_{index}"] / torch.where(weight > 0, weight, 1.0).unsqueeze(-1)
    return unpack(packed.flatten(0, 1), size_of(side, region))


def inverse_root(factor: Tensor, exponent: float, epsilon: float) -> Tensor:
    """(A + epsilon I)^-exponent of symmetric (..., S, S); a smallest eigenvalue below epsilon is shifted to it."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    values, vectors = torch.linalg.eigh(factor + epsilon * identity)
    values = values + (epsilon - values[..., :1]).clamp(min=0)
    values = values.clamp(min=epsilon)  # where the shift's round-off is larger than epsilon
    return vectors * values.pow(-exponent).unsqueeze(-2) @ vectors.mT


def packed_identity(state: State, name: str, count: Tensor, size: int, dtype: torch.dtype) -> None:
    """Put identities, as packed triangles of `dtype`, into a state."""
    eye = pack(torch.eye(size, dtype=dtype, device=count.device))
    state[name] = eye.expand(*count.shape, -1).contiguous()
