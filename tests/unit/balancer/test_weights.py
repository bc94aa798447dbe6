"""Losses and projections of weights: values and gradients against loops in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import build_router
from tests.interop.models import configure
from tests.tiny import adamw, batch, tiny_model
from tests.unit.balancer.compare import assert_gradients
from titan_moe.balancer import BALANCERS
from titan_moe.balancer.weights import bounded_noise
from titan_moe.dry_run import check_parts
from titan_moe.model.moe import all_experts_here
from titan_moe.step import train_step

T, E, D, F = 6, 4, 5, 3


def our_loss(name: str, rows_ED: Tensor, w1: Tensor, **arguments: Any) -> Tensor:
    """The loss at coefficient 1 of a micro-batch that has all tokens of its step."""
    balancer = BALANCERS[name](coeff=1.0, **arguments)
    routing = build_router("topk_softmax")(torch.randn(T, E), None)
    values = {"routing": routing, "router": SimpleNamespace(weight=rows_ED)}
    if name == "erc":
        values |= {"w1": w1, "gather_experts": all_experts_here}
    assert balancer.measure is not None
    measure = balancer.measure(**values)
    return balancer.loss(routing, routing.tokens_per_expert, T, measure=measure)


def weights() -> tuple[list[Tensor], list[Tensor]]:
    """Router rows and w1, and their copies in float64."""
    ours = [torch.randn(E, D, requires_grad=True), torch.randn(E, F, D, requires_grad=True)]
    return ours, [weight.detach().double().requires_grad_() for weight in ours]


def dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x * y for x, y in zip(a, b, strict=True)]).sum()


def test_simbal_is_its_formula() -> None:
    """|| R^T R - I ||_1 with experts as columns: the sum over all pairs of experts."""
    (rows, w1), (double, _) = weights()
    pairs = [(dot(double[i], double[j]) - float(i == j)).abs() for i in range(E) for j in range(E)]
    assert_gradients(our_loss("simbal", rows, w1), torch.stack(pairs).sum(), [rows], [double])


def test_router_orthogonality_is_its_formula() -> None:
    (rows, w1), (double, _) = weights()
    unit = [row / dot(row, row).sqrt() for row in double]
    pairs = [(dot(unit[i], unit[j]) - float(i == j)) ** 2 for i in range(E) for j in range(E)]
    assert_gradients(our_loss("router_orthogonality", rows, w1), torch.stack(pairs).mean(), [rows], [double])


def erc_formula(rows: list[Tensor], w1: Tensor, alpha: float) -> Tensor:
    """1/n^2 sum_i sum_{j != i} [max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)], M_ij = || R_i W_g^j ||."""
    M = [[torch.stack([dot(row, w1[j][f]) ** 2 for f in range(F)]).sum().sqrt() for j in range(E)] for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(E):
        for j in range(E):
            if i != j:
                total = total + (M[i][j] - alpha * M[i][i]).clamp(min=0) + (M[j][i] - alpha * M[i][i]).clamp(min=0)
    return total / E**2


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_erc_without_noise_is_its_formula(alpha: float) -> None:
    ours, doubles = weights()
    formula = erc_formula(list(doubles[0]), doubles[1], alpha)
    assert_gradients(our_loss("erc", *ours, alpha=alpha, noise=False), formula, ours, doubles)


def test_erc_is_its_formula_with_the_noise_that_was_drawn() -> None:
    """eps_i = min_j |R_i - R_j| / (2 |R_i|); neither eps nor what is drawn has a gradient."""
    ours, doubles = weights()
    torch.manual_seed(3)
    loss = our_loss("erc", *ours)
    torch.manual_seed(3)
    torch.randn(T, E)  # the logits that `our_loss` draws
    drawn = torch.rand(E, D).double()
    fixed = doubles[0].detach()
    noisy = []
    for i in range(E):
        nearest = min(float((fixed[i] - fixed[j]).norm()) for j in range(E) if j != i)
        eps = nearest / (2 * float(fixed[i].norm()))
        noisy.append(doubles[0][i] * ((1 - eps) + drawn[i] * 2 * eps))
    assert_gradients(loss, erc_formula(noisy, doubles[1], 1.0), ours, doubles)


def test_noise_keeps_every_row_nearest_to_itself() -> None:
    rows = torch.randn(64, D)
    for _ in range(20):
        moved = rows * bounded_noise(rows, 64, all_experts_here)
        assert not torch.equal(moved, rows)
        assert torch.equal(torch.cdist(moved, rows).argmin(-1), torch.arange(64))


def test_erc_adds_up_its_norms_in_fp32() -> None:
    """Experts in bf16, as mixed precision has them: the sums of squares are rounded once, not at each addition."""
    rows, w1 = torch.randn(E, D), torch.randn(E, 4096, D).bfloat16()
    exact = our_loss("erc", rows.bfloat16(), w1.float(), noise=False)
    torch.testing.assert_close(our_loss("erc", rows, w1, noise=False), exact, rtol=2e-3, atol=0)


def test_row_norm_holds_after_every_step() -> None:
    """Each row keeps the direction that the optimizer gave it."""
    model, plain = tiny_model(), tiny_model()
    for one, norm in ((model, 0.5), (plain, None)):
        one.init_weights(0)
        balancers = {} if norm is None else {"row_norm": (1.0, BALANCERS["row_norm"](norm=norm))}
        train_step(one, [batch(1)], adamw(one), balancers, one.expert_biases(), max_norm=1.0)
    for layer, other in zip(model.moe_layers(), plain.moe_layers(), strict=True):
        rows = layer.router.weight.detach().double()
        torch.testing.assert_close(rows.norm(dim=-1), torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)
        stepped = other.router.weight.detach().double()
        torch.testing.assert_close(rows, 0.5 * stepped / stepped.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-7)


OWN = {"router.name": "examples.router:cosine"}
BAD = [
    ({"balancer.erc.alpha": 1.5}, "balancer.erc.alpha = 1.5: must be less than or equal to 1"),
    ({"balancer.row_norm.norm": 0.0}, "balancer.row_norm.norm = 0.0: must be greater than 0"),
    ({"balancer.simbal.coeff": 0.1, **OWN}, r"balancer.simbal needs a router with a matrix `weight` \(E, D\)"),
    ({"balancer.router_orthogonality.coeff": 0.1, **OWN}, "balancer.router_orthogonality needs a router with a matrix"),
    (
        {"balancer.erc.coeff": 0.1, **OWN},
        "balancer.erc needs a router with a matrix .*CosineLogits of this one has not",
    ),
    ({"balancer.row_norm.norm": 1.0, **OWN}, "balancer.row_norm needs a router with a matrix .* this one has"),
    ({"balancer.erc.coeff": 0.1, "moe.num_experts": 1, "moe.top_k": 1}, "needs moe.num_experts of 2 or more"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_can_not_work_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parts(configure(**{"moe.num_experts": 4, **words}))
