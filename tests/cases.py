"""Every component of a registry with its defaults, and once more for each other choice that its signature offers."""

import inspect
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from titan_moe.config import find_component
from titan_moe.model.routing import ROUTERS, Router, Routing
from titan_moe.model.routing.common import OFFERED, asked_for, parametric
from titan_moe.optimizer.build import OPTIMIZERS


class Case(NamedTuple):
    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.arguments.items())])


def cases(
    registry: Mapping[str, Callable[..., Any]],
    extra: Mapping[str, list[dict[str, Any]]] | None = None,
    without: Collection[str] = (),
) -> list[Case]:
    """One Case per entry, one per value of an argument that is a Literal or a bool, and those of `extra`.

    The arguments in `without` have no case of their own.
    """
    found = []
    for name, builder in registry.items():
        found.append(Case(name, {}))
        hints = get_type_hints(builder)
        for key, parameter in inspect.signature(builder).parameters.items():
            if key in without:
                continue
            choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
            choices = (True, False) if hints[key] is bool else choices
            found += [Case(name, {key: choice}) for choice in choices if choice != parameter.default]
        found += [Case(name, arguments) for arguments in (extra or {}).get(name, [])]
    return found


def top_k_of(name: str) -> int:
    """2, or 1 for a router that takes no other."""
    try:
        build(ROUTERS, name, top_k=2)
    except ValueError:
        return 1
    return 2


def build(registry: Mapping[str, Callable[..., Any]], name: str, **arguments: Any) -> Any:
    """A component of a registry or, by `module:fn`, of the examples."""
    return find_component(registry, name)(**arguments)


def build_router(name: str, **arguments: Any) -> Any:
    return build(ROUTERS, name, top_k=top_k_of(name), **arguments)


def build_route(name: str, **arguments: Any) -> Router:
    """Its function of logits and bias; the tokens are one sequence of two documents, for one that asks."""
    route = parametric(build_router(name, **arguments)).route
    asked = asked_for(route, OFFERED)

    def with_places(logits: torch.Tensor, bias: torch.Tensor | None) -> Routing:
        tokens = torch.arange(len(logits)).unsqueeze(0)
        places = {"positions": tokens, "document_ids": (tokens >= len(logits) // 2).long()}
        return route(logits, bias, **{name: places[name] for name in asked})

    return with_places if asked else route


def takes_bias(name: str) -> bool:
    try:
        build_route(name)(torch.zeros(4, 4), torch.zeros(4))
    except ValueError:
        return False
    return True


# These look at all tokens of a forward pass together; in all others a token's choice is its own.
WHOLE_BATCH = ("expert_choice", "base", "sinkhorn", "token_rounding")
# In these a token's choice depends on others of its sequence.
OF_SEQUENCES = tuple(name for name in ROUTERS if parametric(build_router(name)).whole_sequences)
# In these it may have any number of experts.
ANY_NUMBER = ("expert_choice", "threshold", "token_rounding")
NOISE = {"jitter", "noise_std"}


def draws_noise(case: Case) -> bool:
    """It draws random numbers in training."""
    return bool(case.arguments.keys() & NOISE) or (case.name == "emo" and "min_pool" not in case.arguments)


ROUTER_CASES = cases(
    ROUTERS,
    # The first means nothing without a capacity factor. A tile of 128 is more than tests have tokens for an expert.
    without=["drop_policy", "rounding"],
    extra={
        "topk_softmax": [
            {"num_groups": 2, "topk_groups": 1},
            {"capacity_factor": 0.75},
            {"capacity_factor": 0.75, "drop_policy": "score"},
            {"jitter": 0.2},
            {"noise_std": 0.5},
        ],
        "softmax_topk": [{"capacity_factor": 0.75}],
        "switch": [{"capacity_factor": 0.75, "drop_policy": "score"}],
        "sigmoid": [{"num_groups": 2, "topk_groups": 1}],
        "expert_choice": [{"capacity_factor": 0.5}, {"capacity_factor": 1.5, "order": "topk_softmax"}],
        "threshold": [{"max_k": 3}],
        "token_rounding": [{"tile": 4, "rounding": rounding} for rounding in ("nearest", "up", "down")],
        "causal_bias": [{"rate": 0.3}],
        "emo": [{"min_pool": 3, "max_pool": 3}, {"min_pool": 3, "max_pool": 3, "norm_topk": True}],
    },
)
ROUTER_CASES = [case for case in ROUTER_CASES if case != Case("token_rounding", {})]


# Optimizers that can be built here: Meta's needs its package.
OPTIMIZER_NAMES = [name for name in OPTIMIZERS if name != "distributed_shampoo" or find_spec(name)]
AVERAGING = {"schedule_free_adamw"}  # their weights are averaged over steps: decay is a part of it
