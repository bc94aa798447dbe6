"""Routers: pure functions from router logits to the experts of every token.

A router is built from its arguments, `ROUTERS[name](**arguments)`, and then maps (router_logits_TE, expert_bias_E or
None) to a `Routing`; a builder may also give a `ParametricRouter`. All of its math is fp32. `expert_bias` takes part in
the choice of experts only: the weights that combine the experts' outputs never see it. `token_choice` has the routers
in which each token chooses its experts, `parametric` those with parameters of their own, `dynamic` those that keep more
or fewer than top_k choices, `sequence` those that look at a token's sequence, `batch` those that look at all tokens at
once, and `common` what they share.
"""

from collections.abc import Callable
from typing import Any

from titan_moe.model.routing.batch import base, expert_choice, sinkhorn
from titan_moe.model.routing.common import ParametricRouter, Places, Router, Routing, force_balanced, make_routing
from titan_moe.model.routing.dynamic import threshold, token_rounding
from titan_moe.model.routing.parametric import cosine, mlp, prototype
from titan_moe.model.routing.sequence import causal_bias, emo
from titan_moe.model.routing.token_choice import sigmoid, softmax_topk, switch, topk_softmax

__all__ = ["ROUTERS", "ParametricRouter", "Places", "Router", "Routing", "force_balanced", "make_routing"]

# Builders of a Router or a ParametricRouter.
ROUTERS: dict[str, Callable[..., Any]] = {
    "topk_softmax": topk_softmax,
    "softmax_topk": softmax_topk,
    "switch": switch,
    "sigmoid": sigmoid,
    "expert_choice": expert_choice,
    "base": base,
    "sinkhorn": sinkhorn,
    "cosine": cosine,
    "mlp": mlp,
    "prototype": prototype,
    "threshold": threshold,
    "token_rounding": token_rounding,
    "causal_bias": causal_bias,
    "emo": emo,
}
