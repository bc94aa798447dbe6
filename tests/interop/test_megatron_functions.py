"""Routers and balancers against megatron-core's own functions, where it is installed (the extra `interop`)."""

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titan_moe.balancer import BALANCERS
from titan_moe.model.routing import ROUTERS, Routing
from titan_moe.model.routing.batch import sinkhorn_log_plan
from titan_moe.step import sequence_load

T, E, K, SEQUENCES = 32, 8, 2, 4


@pytest.fixture(scope="module")
def megatron() -> Any:
    """megatron-core's functions of a MoE layer; importing it warns about every kernel that is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.transformer.moe.moe_utils")


def logits(grad: bool = False) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def dense(routing: Routing) -> Tensor:
    """The weights at their experts, (T, E)."""
    return torch.zeros(T, E).scatter(1, routing.topk_experts, routing.topk_scores)


BIAS = torch.linspace(-0.4, 0.4, E)
ROUTINGS = [
    ("topk_softmax", {}, {}, None),
    ("softmax_topk", {}, {"use_pre_softmax": True}, None),
    ("switch", {}, {"use_pre_softmax": True}, None),
    ("sigmoid", {}, {"score_function": "sigmoid"}, None),
    ("sigmoid", {"score_scale": 2.5}, {"score_function": "sigmoid", "scaling_factor": 2.5}, BIAS),
    (
        "sigmoid",
        {"num_groups": 4, "topk_groups": 2},
        {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
        BIAS,
    ),
    (
        "softmax_topk",
        {"num_groups": 4, "topk_groups": 2},
        {"use_pre_softmax": True, "num_groups": 4, "group_topk": 2},
        None,
    ),
]


@pytest.mark.parametrize(("name", "ours", "theirs", "bias"), ROUTINGS)
def test_weights_and_choices(
    megatron: Any, name: str, ours: dict[str, Any], theirs: dict[str, Any], bias: Tensor | None
) -> None:
    top_k = 1 if name == "switch" else K
    routing = ROUTERS[name](top_k=top_k, **ours)(logits(), bias)
    weights, chosen = megatron.topk_routing_with_score_function(logits(), top_k, expert_bias=bias, **theirs)
    assert_close(dense(routing), weights, rtol=1e-5, atol=1e-6)
    assert_close(routing.tokens_per_expert, chosen.sum(0))


def test_drops_by_score(megatron: Any) -> None:
    """Its drops by position are no reference: on ties its topk keeps any of the tokens, not the first ones."""
    routing = ROUTERS["softmax_topk"](top_k=K, capacity_factor=0.75, drop_policy="score")(logits(True), None)
    weights, chosen = megatron.topk_routing_with_score_function(logits(), K, use_pre_softmax=True)
    kept, _ = megatron.apply_router_token_dropping(weights, chosen, K, 0.75, drop_policy="probs")
    assert (kept != weights).any()
    assert_close(dense(routing).detach(), kept, rtol=1e-5, atol=1e-6)


def test_sinkhorn(megatron: Any) -> None:
    want = megatron.sinkhorn(logits(), tol=1e-9)
    plan = sinkhorn_log_plan(logits(), 200).exp()
    assert_close(plan / plan.sum(), want / want.sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "score"), [("topk_softmax", "softmax"), ("sigmoid", "sigmoid")])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_aux_loss_and_its_gradient(megatron: Any, name: str, score: str, scope: str) -> None:
    """Theirs is E / K of ours; per sequence it is the mean over sequences."""
    x = logits(True)
    routing = ROUTERS[name](top_k=K)(x, None)
    load = sequence_load(routing, SEQUENCES) if scope == "sequence" else routing.tokens_per_expert
    loss = BALANCERS["aux_loss"](coeff=0.1, scope=scope).loss(routing, load, T)
    (grad,) = torch.autograd.grad(loss, x)

    y = logits(True)
    chosen, probs = megatron.compute_routing_scores_for_aux_loss(y, K, score)
    parts = SEQUENCES if scope == "sequence" else 1
    losses = [
        megatron.switch_load_balancing_loss_func(p, c.sum(0), T // parts, K, E, 0.1)
        for p, c in zip(probs.chunk(parts), chosen.chunk(parts), strict=True)
    ]
    want = torch.stack(losses).mean() * K / E
    (want_grad,) = torch.autograd.grad(want, y)
    assert_close(loss, want, rtol=1e-5, atol=1e-7)
    assert_close(grad, want_grad, rtol=1e-4, atol=1e-8)


def test_z_loss(megatron: Any) -> None:
    routing = ROUTERS["topk_softmax"](top_k=K)(logits(), None)
    loss = BALANCERS["z_loss"](coeff=0.001).loss(routing, routing.tokens_per_expert, T)
    assert_close(loss, megatron.z_loss_func(logits(), 0.001))


def test_bias_after_a_step(megatron: Any) -> None:
    load = ROUTERS["sigmoid"](top_k=K)(logits(), BIAS).tokens_per_expert
    with mock.patch("torch.distributed.all_reduce"), mock.patch.object(megatron, "parallel_state"):
        want = megatron.get_updated_expert_bias(load.float(), BIAS.clone(), 0.01)
    assert_close(BALANCERS["loss_free"](rate=0.01).post_step(load, BIAS), want)
