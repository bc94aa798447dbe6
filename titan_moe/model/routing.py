"""Routers: pure functions from router logits to the experts of every token.

Shapes: T tokens, E experts, K top_k.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """What a router decided for T tokens. Everything about balance is a function of it."""

    router_logits: Tensor  # (T, E) fp32, before temperature, noise and bias
    scores: Tensor  # (T, E) fp32, sums to 1 over experts: the probabilities that balance losses use
    topk_scores: Tensor  # (T, K) fp32, the weights that combine the experts' outputs
    topk_experts: Tensor  # (T, K) int64
    tokens_per_expert: Tensor  # (E,) int64, sums to T * K


Router = Callable[[Tensor, Tensor | None], Routing]
