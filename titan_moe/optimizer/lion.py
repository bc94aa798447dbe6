"""Lion: steps by the sign of an interpolated momentum (Chen et al., 2023, "Symbolic discovery of optimization
algorithms", algorithm 2); equal to the authors' code.

    u = sign(beta1 m + (1 - beta1) g)
    W <- W - lr (u + weight_decay W)
    m <- beta2 m + (1 - beta2) g
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_moe.optimizer.kernels import elementwise
from titan_moe.optimizer.transform import Transform


def lion(*, beta1: float = 0.9, beta2: float = 0.99) -> Transform:
    """Lion, the sign of a momentum, with decoupled decay and half of AdamW's state (Chen et al., 2023).

    All elements move by the rate, so it is 3 to 10 times lower than AdamW's, and the decay as much higher.
    """

    def direction(
        gradients: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]
    ) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
        (averages,) = states
        mixed = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(mixed, gradients, alpha=1 - beta1)
        new = torch._foreach_mul(averages, beta2)
        torch._foreach_add_(new, gradients, alpha=1 - beta2)
        return torch._foreach_sign(mixed), [new]

    return elementwise(("exp_avg",), direction)
