"""Muon for each expert by itself: the orthogonal factor of the momentum, by batched Newton-Schulz iterations.

Jordan et al. (2024); the step size by shape of Liu et al. (2025, "Muon is scalable for LLM training") takes AdamW's
learning rate and decay. Equal to torch.optim.Muon on a matrix. The iterations' coefficients may be those of Amsel et
al. (2025, "The Polar Express", arXiv 2505.16932, algorithm 1), which come nearer to one in as many steps.

Shapes: R rows (experts), M x N a matrix.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_moe.norms import matrix_norms
from titan_moe.optimizer import transform
from titan_moe.optimizer.transform import MatmulDtype, State, Tick, Transform
from titan_moe.runtime.dtypes import DTYPES

SMALLEST_NORM = 1e-7
# a, b, c of each iteration x <- a x + b x^3 + c x^5 on the singular values; further iterations repeat the last row.
# Jordan's is steepest at zero, with no fixed point at one. Those of Polar Express are each the best after the ones
# before, for singular values from 1e-3 to 1; the last one converges.
JORDAN = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # Polar Express diverges above one, where bf16 may round to: all but the last row are for x / 1.01

Coefficients = Literal["jordan", "polar_express"]
StepSize = Literal["match_rms_adamw", "original"]


def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    coefficients: Coefficients = "jordan",
    adjust_lr: StepSize = "match_rms_adamw",
    matmul_dtype: MatmulDtype = "bfloat16",
) -> Transform:
    """Muon, orthogonalized momentum, each expert by itself (Jordan et al., 2024).

    `adjust_lr` "match_rms_adamw" takes AdamW's learning rate and decay (Liu et al., 2025): a factor 0.2 sqrt(max(M, N))
    gives the update the root mean square of AdamW's. "original" is Jordan's factor sqrt(max(1, M / N)). beta1, beta2
    and eps are those of AdamW, for what is no matrix.
    """
    base = orthogonal_momentum(momentum, nesterov, ns_steps, coefficients, matmul_dtype)

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # all singular values are one, so that the size of a step depends on the matrix' shape alone
        height, width = gradient.shape[1:]
        size = 0.2 * max(height, width) ** 0.5 if adjust_lr == "match_rms_adamw" else stretch(height, width)
        return base.update(gradient, state, tick) * size

    return Transform(base.init, update, reads_weight=False)


def stretch(height: int, width: int) -> float:
    """Jordan's factor of a matrix with more rows, outputs, than columns."""
    return max(1, height / width) ** 0.5


def orthogonal_momentum(
    momentum: float, nesterov: bool, ns_steps: int, coefficients: Coefficients, matmul_dtype: MatmulDtype
) -> Transform:
    """The orthogonal factor of the momentum, with singular values near one; the arguments are Muon's."""
    average = transform.momentum(momentum, "momentum_buffer", correct_bias=False)

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        mean = average.update(gradient, state, tick)
        direction = gradient.lerp(mean, momentum) if nesterov else mean  # (R, M, N)
        return orthogonalize(direction, ns_steps, DTYPES[matmul_dtype], coefficients).float()

    return Transform(average.init, update, reads_weight=False)


def orthogonalize(x: Tensor, steps: int, dtype: torch.dtype, coefficients: Coefficients = "jordan") -> Tensor:
    """Bring the singular values of each matrix of (R, M, N) near one, in `dtype`; a zero matrix stays zero."""
    # on the shorter side the products of an iteration are smallest
    wide = x.to(dtype).mT if x.shape[1] > x.shape[2] else x.to(dtype)  # (R, min(M, N), max(M, N))

    # the iteration converges from singular values of at most one, and the Frobenius norm is a bound of them
    safety = SAFETY if coefficients == "polar_express" else 1.0
    norm_R11 = (matrix_norms(wide) * safety).clamp(min=SMALLEST_NORM).view(-1, 1, 1)
    wide = wide / norm_R11.to(dtype)
    for a, b, c in iterations(coefficients, steps):
        gram = wide @ wide.mT  # (R, min(M, N), min(M, N))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide.mT if x.shape[1] > x.shape[2] else wide


def iterations(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """The three coefficients of each of so many iterations."""
    if coefficients == "jordan":
        return list(JORDAN) * steps
    table = [*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]), POLAR_EXPRESS[-1]]
    return [table[min(step, len(table) - 1)] for step in range(steps)]
