"""What processes that share the matrices of a layer have to do before and after it; nothing where one has them whole.

Shapes: B batch, S sequence, D dim, P processes, P S the tokens of all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Share(NamedTuple):
    """The two ends of a layer: `gather` (B, S, D) -> (B, P S, D), `reduce` (B, P S, D) -> (B, S, D), a sum over P."""

    gather: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


WHOLE = Share(_as_it_is, _as_it_is)


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """The linear layer, or what the rows or columns of its matrix give that this process has."""
    return F.linear(x, linear.weight.to_local()) if isinstance(linear.weight, DTensor) else linear(x)
