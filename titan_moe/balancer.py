"""Load balancing: a balancer is a pair of pure functions of a layer's routing and of its load."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from titan_moe.model.routing import Routing


class Balancer(NamedTuple):
    """How a layer's load is kept even: by a loss on its routing, by a bias on its selection, or both.

    `loss(routing, load_E, num_tokens)` is this micro-batch's share of the step's loss, a scalar: a mean over the
    tokens of the micro-batch times (its tokens / `num_tokens`), so that shares of micro-batches and ranks add up.
    `post_step(load, expert_bias)` gives the bias after an optimizer step; both are (..., E), loads are global.
    """

    loss: Callable[[Routing, Tensor, Tensor | int], Tensor]
    post_step: Callable[[Tensor, Tensor], Tensor]
