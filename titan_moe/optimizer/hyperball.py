"""Hyperball: a matrix keeps its Frobenius norm, and a step turns it by the rate (Wen et al., 2026, arXiv 2606.16899).

    u = the direction of Muon (MuonH) or of AdamW (AdamH)
    W <- W - lr |W0| u / |u|          W <- |W0| W / |W|

The norms are of each matrix, in a stack of each expert's; |W0| is that of its weights before the first step. The rate
is the size of a step over that of the matrix, so a scale of u cancels. Where the authors' code takes the norm before
each step, which is the same but for round-off, the first one is kept: round-off does not add up, and a matrix that has
been changed from outside comes back. Decay, done before the step, changes no more than its length.

Shapes: R rows of a stack (experts), M x N a matrix.
"""

import torch
from torch import Tensor

from titan_moe.norms import matrix_norms
from titan_moe.optimizer.muon import Coefficients, muon
from titan_moe.optimizer.transform import MatmulDtype, State, Tick, Transform, adamw

SMALLEST = 1e-10  # the authors'; a direction of zeros is no step


def muonh(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    coefficients: Coefficients = "jordan",
    matmul_dtype: MatmulDtype = "bfloat16",
) -> Transform:
    """MuonH, Muon on a sphere: each expert's matrix keeps its norm and turns by the rate (Wen et al., 2026).

    A rate to begin with is sqrt(lr * weight_decay) of a Muon that does well. beta1, beta2, eps and weight_decay are
    those of AdamW, for what is no matrix.
    """
    base = muon(
        momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, coefficients=coefficients, matmul_dtype=matmul_dtype
    )
    return hyperball(base)


def adamh(*, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8) -> Transform:
    """AdamH, Adam on a sphere: each expert's matrix keeps its norm and turns by the rate (Wen et al., 2026).

    A rate to begin with is sqrt(lr * weight_decay) of an AdamW that does well. The arguments are AdamW's, for what is
    no matrix too.
    """
    return hyperball(adamw(beta1=beta1, beta2=beta2, eps=eps))


def hyperball(base: Transform) -> Transform:
    """Turn matrices along the direction of `base`, and keep their norms.

    Raises ValueError at the first step of a matrix of zeros, which has no norm to keep.
    """

    def init(weight: Tensor) -> State:
        return base.init(weight) | {"radius": weight.new_zeros(weight.shape[0], dtype=torch.float32)}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # of all rows, alive or not: what happens to their weights before they have a step of their own is no norm
        if tick.step == 1:
            state["radius"].copy_(matrix_norms(tick.weight()))
            refuse_zeros(state["radius"], gradient)
        direction = base.update(gradient, state, tick)  # (R, M, N)
        scale_R = state["radius"] / matrix_norms(direction).clamp(min=SMALLEST)
        return direction * scale_R.view(-1, 1, 1)

    def retract(weight: Tensor, state: State, tick: Tick) -> None:
        scale_R = state["radius"] / matrix_norms(weight).clamp(min=SMALLEST)
        if tick.alive is not None:
            scale_R = torch.where(tick.alive, scale_R, 1.0)
        weight.mul_(scale_R.view(-1, 1, 1))

    return base._replace(init=init, update=update, kernel=None, retract=retract, reads_weight=True)


def refuse_zeros(radius_R: Tensor, gradient: Tensor) -> None:
    """Raise ValueError if a norm is 0 or not finite; waits for a GPU, at the first step alone."""
    if not ((radius_R > 0) & radius_R.isfinite()).all():
        height, width = gradient.shape[1:]
        raise ValueError(
            f"muonh and adamh keep the norm of each matrix, and one of {height} x {width} begins with a norm of 0 or "
            "that is not finite: begin with other weights, or name another optimizer for its group"
        )
