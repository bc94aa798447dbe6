"""Constant factors inside of the model's forward: a parametrization's, all 1 in the standard one.

A factor of 1 is not computed at all. Each of them can be folded into weights: `folded` says by how much.
"""

from typing import NamedTuple

from torch import Tensor


class Multipliers(NamedTuple):
    """What the forward multiplies, beside what the standard model computes."""

    embedding: float = 1.0  # the embedded tokens
    logits: float = 1.0  # the output logits
    residual: float = 1.0  # what attention and the feed-forward network of a layer add to the residual stream
    attention: float = 1.0  # the attention logits, beside 1 / sqrt(head_dim)
    router_logits: float = 1.0
    expert_output: float = 1.0  # the weighted sum of the routed experts; not that of the shared ones


def times(x: Tensor, factor: float) -> Tensor:
    """x * factor; x itself where the factor is 1."""
    return x if factor == 1.0 else x * factor


def folded(name: str, multipliers: Multipliers, *, tied: bool, qk_norm: bool) -> float:
    """By how much the parameter `name` is to be multiplied, so that a model without multipliers computes the same.

    With a tied head the embedding's factor is in the matrix of both, and the last norm takes it back for the head. For
    a router of one matrix, and without identity experts, whose output no weight scales.
    """
    m = multipliers
    if name == "tok_embeddings.weight":
        return m.embedding
    if name == "norm.weight":
        return m.logits / m.embedding if tied else m.logits

    # Of each product one side takes the factor: queries, what writes to the residual stream, and the router.
    if name.endswith(".attention.q_norm.weight" if qk_norm else (".attention.wq.weight", ".attention.wq.bias")):
        return m.attention
    if name.endswith((".attention.wo.weight", ".feed_forward.w2.weight", ".shared_experts.w2.weight")):
        return m.residual
    if name.endswith(".experts.w2"):
        return m.residual * m.expert_output
    return m.router_logits if name.endswith(".moe.router.weight") else 1.0
