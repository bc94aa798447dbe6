"""Muon for each expert by itself: the orthogonal factor of the momentum, by batched Newton-Schulz iterations.

Jordan et al. (2024); the step size by shape of Liu et al. (2025, "Muon is scalable for LLM training") takes AdamW's
learning rate and decay. Equal to torch.optim.Muon on a matrix.

Shapes: R rows (experts), M x N a matrix.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_moe.norms import matrix_norms
from titan_moe.optimizer import transform
from titan_moe.optimizer.transform import MatmulDtype, State, Tick, Transform
from titan_moe.runtime.dtypes import DTYPES

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic; steepest at zero, with no fixed point at one
SMALLEST_NORM = 1e-7

StepSize = Literal["match_rms_adamw", "original"]


def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: StepSize = "match_rms_adamw",
    matmul_dtype: MatmulDtype = "bfloat16",
) -> Transform:
    """Muon, orthogonalized momentum, each expert by itself (Jordan et al., 2024).

    `adjust_lr` "match_rms_adamw" takes AdamW's learning rate and decay (Liu et al., 2025): a factor 0.2 sqrt(max(M, N))
    gives the update the root mean square of AdamW's. "original" is Jordan's factor sqrt(max(1, M / N)). beta1, beta2
    and eps are those of AdamW, for what is no matrix.
    """
    average = transform.momentum(momentum, "momentum_buffer", correct_bias=False)

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        mean = average.update(gradient, state, tick)
        direction = gradient.lerp(mean, momentum) if nesterov else mean  # (R, M, N)

        # all singular values are then one, so that the size of a step depends on the matrix' shape alone
        height, width = gradient.shape[1:]
        size = 0.2 * max(height, width) ** 0.5 if adjust_lr == "match_rms_adamw" else max(1, height / width) ** 0.5
        return orthogonalize(direction, ns_steps, DTYPES[matmul_dtype]).float() * size

    return Transform(average.init, update, reads_weight=False)


def orthogonalize(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix of (R, M, N) near one, in `dtype`; a zero matrix stays zero."""
    # on the shorter side the products of an iteration are smallest
    wide = x.to(dtype).mT if x.shape[1] > x.shape[2] else x.to(dtype)  # (R, min(M, N), max(M, N))

    # the iteration converges from singular values of at most one, and the Frobenius norm is a bound of them
    norm_R11 = matrix_norms(wide).clamp(min=SMALLEST_NORM).view(-1, 1, 1)
    wide = wide / norm_R11.to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = wide @ wide.mT  # (R, min(M, N), min(M, N))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide.mT if x.shape[1] > x.shape[2] else wide
