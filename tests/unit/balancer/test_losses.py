"""Losses on what the router gave: values and gradients against loops in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.cases import build_router
from tests.interop.models import configure
from tests.unit.balancer.compare import assert_gradients
from titan_moe.balancer import BALANCERS
from titan_moe.config.checks import check_config

T, E, K = 7, 5, 2


def test_score_variance_is_its_formula() -> None:
    """L_v = -sum_i sum_j 1/n (s_ij - mean_i s_ij)^2 over the tokens, which is here divided by their number."""
    logits = torch.randn(T, E, requires_grad=True)
    routing = build_router("topk_softmax")(logits, None)
    ours = BALANCERS["score_variance"](coeff=1.0).loss(routing, routing.tokens_per_expert, 2 * T)

    double = logits.detach().double().requires_grad_()
    rows: list[Tensor] = []
    for i in range(T):
        chosen = double[i].topk(K)
        row = torch.zeros(E, dtype=torch.float64)
        for weight, j in zip(chosen.values.softmax(-1), chosen.indices, strict=True):
            row = row + weight * torch.eye(E, dtype=torch.float64)[j]
        rows.append(row)
    total = sum(-((rows[i][j] - sum(row[j] for row in rows) / T) ** 2) / E for i in range(T) for j in range(E))
    assert_gradients(ours, total / (2 * T), [logits], [double])


def test_coupling_is_its_formula() -> None:
    """-mean over pairs of adjacent layers and tokens of sum over e and v chosen there of p_e p_v."""
    layers = [torch.randn(T, E, requires_grad=True) for _ in range(3)]
    routings = [build_router("topk_softmax")(logits, None) for logits in layers]
    balancer, loads = BALANCERS["coupling"](coeff=1.0), {"micro_batch": routings[0].tokens_per_expert}
    ours = sum(balancer.loss_of(routings, i, loads, 2 * T, "coupling") for i in range(3)) / 3

    doubles = [logits.detach().double().requires_grad_() for logits in layers]
    total = torch.zeros((), dtype=torch.float64)
    for one, two in pairwise(doubles):
        for i in range(T):
            for e in one[i].topk(K).indices:
                for v in two[i].topk(K).indices:
                    total = total - one[i].softmax(-1)[e] * two[i].softmax(-1)[v]
    assert_gradients(ours, total / 2 / (2 * T), layers, doubles)


def test_choices_that_are_no_expert_have_no_part() -> None:
    """Where experts choose tokens, a token may have fewer experts than slots."""
    logits = torch.randn(T, E, requires_grad=True)
    routing = build_router("expert_choice")(logits, None)
    assert (routing.topk_experts == E).any()
    weights = torch.zeros(T, E)
    for i in range(T):
        for weight, j in zip(routing.topk_scores[i], routing.topk_experts[i], strict=True):
            if j < E:
                weights[i, j] = weight.detach()
    loss = BALANCERS["score_variance"](coeff=1.0).loss(routing, routing.tokens_per_expert, T)
    torch.testing.assert_close(loss.detach(), -weights.var(0, correction=0).mean())
    mass = (routing.scores * (weights > 0)).sum(-1).detach()
    loads = {"micro_batch": routing.tokens_per_expert}
    coupled = BALANCERS["coupling"](coeff=1.0).loss_of([routing, routing], 1, loads, T, "coupling") / 2
    torch.testing.assert_close(coupled.detach(), -mass.square().mean())


def test_coupling_needs_two_layers() -> None:
    words = {"moe.num_experts": 4, "model.num_layers": 2, "moe.first_dense_layers": 1, "balancer.coupling.coeff": 0.1}
    with pytest.raises(
        ValueError, match=r"balancer\.coupling goes from one MoE layer to the next, but this model has 1"
    ):
        check_config(configure(**words))
