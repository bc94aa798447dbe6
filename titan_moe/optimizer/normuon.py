"""NorMuon: Muon whose rows, the neurons, have steps of one size (Li et al., 2025, arXiv 2510.05491).

    O = the orthogonal factor of the momentum, as Muon's
    v <- beta2 v + (1 - beta2) mean over a row of O^2, a number for each row
    D = O / (sqrt(v) + 1e-10), scaled to the Frobenius norm that `adjust_lr` says
    W <- W - lr (D + weight_decay W)

A row of a weight (out, in) is what one output neuron reads. In an expert that is a hidden unit for w1 and w3, and for
w2 a channel of the residual stream. The average needs no correction of its bias: a factor that all rows have cancels.

Shapes: R rows of a stack (experts), M x N a matrix.
"""

import torch
from torch import Tensor

from titan_moe.norms import matrix_norms
from titan_moe.optimizer.muon import Coefficients, StepSize, orthogonal_momentum, stretch
from titan_moe.optimizer.transform import MatmulDtype, State, Tick, Transform

SMALLEST = 1e-10  # the authors', beside a root mean square and a norm


def normuon(
    *,
    momentum: float = 0.95,
    beta2: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    coefficients: Coefficients = "jordan",
    adjust_lr: StepSize = "match_rms_adamw",
    matmul_dtype: MatmulDtype = "bfloat16",
) -> Transform:
    """NorMuon, Muon with a second moment for each row, each expert by itself (Li et al., 2025).

    `adjust_lr` "match_rms_adamw" gives every update a root mean square of 0.2, about AdamW's, and takes AdamW's rate
    and decay: the paper's algorithm 1. "original" is the authors' code: the norm that Muon's update has, times
    sqrt(max(1, M / N)). beta2 is also AdamW's, with beta1 and eps, for what is no matrix.
    """
    base = orthogonal_momentum(momentum, nesterov, ns_steps, coefficients, matmul_dtype)

    def init(weight: Tensor) -> State:
        rows = weight.new_zeros((*weight.shape[:2], 1), dtype=torch.float32)
        return base.init(weight) | {"second_momentum_buffer": rows}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        orthogonal = base.update(gradient, state, tick)  # (R, M, N)

        # rows that are not alive keep their average
        average = state["second_momentum_buffer"]  # (R, M, 1)
        gain = 1 - beta2 if tick.alive is None else ((1 - beta2) * tick.alive).view(-1, 1, 1)
        average.lerp_(orthogonal.square().mean(-1, keepdim=True), gain)
        direction = orthogonal / (average.sqrt() + SMALLEST)  # (R, M, N)

        # rows have changed places in size, and the whole has the norm that it is to have
        height, width = gradient.shape[1:]
        norm = 0.2 * (height * width) ** 0.5
        norm = norm if adjust_lr == "match_rms_adamw" else matrix_norms(orthogonal) * stretch(height, width)
        return direction * (norm / (matrix_norms(direction) + SMALLEST)).view(-1, 1, 1)

    return Transform(init, update, reads_weight=False)
