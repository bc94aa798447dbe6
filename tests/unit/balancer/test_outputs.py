"""Losses of what the experts gave: values and gradients against loops in float64."""

import pytest
import torch
from torch import Tensor

from tests.cases import build_router
from tests.interop.models import configure
from tests.unit.balancer.compare import assert_gradients
from titan_moe.balancer import BALANCERS
from titan_moe.dry_run import check_parts

T, E, K, D = 5, 4, 3, 6


def our_loss(name: str, outputs_TKD: Tensor) -> Tensor:
    """The loss at coefficient 1 of a micro-batch that has half of its step's tokens."""
    balancer = BALANCERS[name](coeff=1.0)
    routing = build_router("topk_softmax")(torch.randn(T, E), None)
    routing = routing._replace(topk_experts=torch.arange(K).expand(T, K))
    assert balancer.measure is not None
    return balancer.loss(routing, routing.tokens_per_expert, 2 * T, measure=balancer.measure(outputs=outputs_TKD))


def pair() -> tuple[Tensor, Tensor]:
    """Outputs, and their copy in float64; a choice that was not computed gave 0."""
    ours = torch.randn(T, K, D)
    ours[1, 2] = 0
    return ours.requires_grad_(), ours.detach().double().requires_grad_()


def test_orthogonality_has_the_printed_gradient() -> None:
    """By x_ij: sum over k != j of x_ik x_ik^T / (<x_ik, x_ik> + eps) x_ij, here over the number of pairs and tokens."""
    ours, x = pair()
    loss = our_loss("orthogonality", ours)
    (gradient,) = torch.autograd.grad(loss, ours)
    printed = torch.zeros_like(x.detach())
    x = x.detach()
    for i in range(T):
        for j in range(K):
            for k in range(K):
                if j != k and x[i, k].any():
                    printed[i, j] += torch.outer(x[i, k], x[i, k]) / (x[i, k] @ x[i, k]) @ x[i, j]
    assert printed.any()
    torch.testing.assert_close(gradient.double(), printed / (K * (K - 1)) / (2 * T), rtol=1e-5, atol=1e-7)


def test_orthogonality_is_half_the_squared_projections() -> None:
    ours, x = pair()
    x, total = x.detach(), torch.zeros((), dtype=torch.float64)
    for i in range(T):
        for j in range(K):
            for k in range(K):
                if j != k and x[i, k].any():
                    projection = (x[i, j] @ x[i, k]) / (x[i, k] @ x[i, k]) * x[i, k]
                    total += projection @ projection / 2
    expected = total / (K * (K - 1)) / (2 * T)
    torch.testing.assert_close(our_loss("orthogonality", ours).double(), expected, rtol=1e-5, atol=0)


def test_specialization_is_its_formula() -> None:
    """The mean over pairs and tokens of the squared cosine, with a gradient by both of a pair."""
    ours, x = pair()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(T):
        for j in range(K):
            for k in range(K):
                if j != k and x[i, j].any() and x[i, k].any():
                    total = total + (x[i, j] @ x[i, k]) ** 2 / (x[i, j] @ x[i, j]) / (x[i, k] @ x[i, k])
    assert_gradients(our_loss("specialization", ours), total / (K * (K - 1)) / (2 * T), [ours], [x])


@pytest.mark.parametrize("name", ["orthogonality", "specialization"])
def test_one_expert_a_token_has_no_pairs(name: str) -> None:
    words = {"moe.num_experts": 4, "moe.top_k": 1, f"balancer.{name}.coeff": 0.1}
    with pytest.raises(ValueError, match=f"balancer.{name} compares the experts of a token: it needs moe.top_k of 2"):
        check_parts(configure(**words))
