"""Routers: pure functions from router logits to the experts of every token.

A router is built from its arguments, `ROUTERS[name](**arguments)`, and then maps (router_logits_TE, expert_bias_E or
None) to a `Routing`; a builder from outside may also give a `ParametricRouter`. All of its math is fp32. `expert_bias`
takes part in the choice of experts only: the weights that combine the experts' outputs never see it. `token_choice` has
the routers in which each token chooses its experts, `batch` those that look at all tokens at once, `common` what they
share.
"""

from collections.abc import Callable

from titan_moe.model.routing.batch import base, expert_choice, sinkhorn
from titan_moe.model.routing.common import ParametricRouter, Places, Router, Routing, force_balanced, make_routing
from titan_moe.model.routing.token_choice import sigmoid, softmax_topk, switch, topk_softmax

__all__ = ["ROUTERS", "ParametricRouter", "Places", "Router", "Routing", "force_balanced", "make_routing"]

ROUTERS: dict[str, Callable[..., Router]] = {
    "topk_softmax": topk_softmax,
    "softmax_topk": softmax_topk,
    "switch": switch,
    "sigmoid": sigmoid,
    "expert_choice": expert_choice,
    "base": base,
    "sinkhorn": sinkhorn,
}
