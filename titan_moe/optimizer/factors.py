"""Kronecker factors: averages of G G^T and G^T G over steps, their inverse roots, batched over experts.

In a state they are packed triangles (R, B, P) by their name, `left_0`, with `count_left_0` (R, B): how many gradients
they have seen. A factor whose product is exactly zero (an expert that got no token) is not counted and stays as it is:
decaying it would not change its directions, but bias correction would take the lost weight for evidence, and after many
such steps the factor would round to zero and its inverse root blow up.

Shapes: R rows (experts), B factors of one size S to a matrix, P = S (S + 1) / 2.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titan_moe.optimizer.blocks import pack, packed_diagonal, unpack
from titan_moe.optimizer.transform import State, Tick

Side = Literal["left", "right"]


class Factor(NamedTuple):
    """Factors of one size: their name in a state, how many to a matrix, and their size."""

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
    """F <- beta2 F + (1 - beta2) product, (R, B, S, S) or any shape of as many numbers."""
    average, count = state[factor.name], state[f"count_{factor.name}"]
    new = pack(product).float().view(average.shape)
    seen = packed_diagonal(new, factor.size).sum(-1) > 0  # |G|^2
    if tick.alive is not None:
        seen &= tick.alive[:, None]
    average.lerp_(new, ((1 - beta2) * seen).unsqueeze(-1))
    count += seen


def mean_factor(factor: Factor, state: State, beta2: float) -> Tensor:
    """The factor with its bias corrected, F / (1 - beta2^count), as squares (R, B, S, S)."""
    weight = 1 - beta2 ** state[f"count_{factor.name}"]
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
    """Compute the inverse root from the factor; without a gradient so far, or where not `alive` (R,), it stays."""
    old, seen = state[f"root_{factor.name}"], has_evidence(factor, state, alive)
    new = pack(inverse_root(mean_factor(factor, state, beta2), exponent, epsilon, old.dtype))
    old.copy_(torch.where(seen.unsqueeze(-1), new.to(old.dtype), old))


def root_of(factor: Factor, state: State) -> Tensor:
    """The inverse root as squares (R, B, S, S)."""
    packed = state[f"root_{factor.name}"]
    return unpack(packed.flatten(0, 1), factor.size).unflatten(0, packed.shape[:2])


def inverse_root(factor: Tensor, exponent: float, epsilon: float, dtype: torch.dtype) -> Tensor:
    """(A + epsilon I)^-exponent of symmetric (..., S, S); a smallest eigenvalue below epsilon is shifted to it.

    `dtype` is of the products that A averages. An eigenvalue that may be the round-off of the largest is set to what
    that can be, so that the root does not depend on the vectors of such eigenvalues, which are other on each machine.
    """
    size = factor.shape[-1]
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
    values, vectors = torch.linalg.eigh(factor + epsilon * identity)
    values = values + (epsilon - values[..., :1]).clamp(min=0)

    # Rounding S x S numbers adds eigenvalues of half a unit times their root mean square, which is at most the largest;
    # adding them up and decomposing them in fp32 adds some sqrt(S) units of it.
    floor = max(torch.finfo(torch.float32).eps * size**0.5, torch.finfo(dtype).eps / 8)
    values = values.maximum((floor * values[..., -1:]).clamp(min=epsilon))
    return vectors * values.pow(-exponent).unsqueeze(-2) @ vectors.mT
