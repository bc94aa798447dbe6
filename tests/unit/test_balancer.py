import math

import pytest
import torch

from titan_moe.balancer import BALANCERS, Balancer, keep_bias, no_loss
from titan_moe.model.routing import ROUTERS, Routing

T, E, K = 12, 4, 2


def route(logits_TE, name="topk_softmax"):
    return ROUTERS[name](top_k=K)(logits_TE, None)


def loss_of(balancer: Balancer, routing: Routing) -> torch.Tensor:
    return balancer.loss(routing, routing.tokens_per_expert, routing.scores.shape[0])


@pytest.mark.parametrize("router", ROUTERS)
def test_aux_loss_is_the_papers_formula(router):
    routing = route(torch.randn(T, E), router)
    m = [sum(e == j for e in routing.topk_experts.flatten().tolist()) / T for j in range(E)]
    ell = [sum(row[j] for row in routing.scores.tolist()) / T for j in range(E)]
    expected = 0.1 * sum(a * b for a, b in zip(m, ell, strict=True))
    assert loss_of(BALANCERS["aux_loss"](coeff=0.1), routing).item() == pytest.approx(expected, rel=1e-6)


def test_aux_loss_by_hand():
    # two tokens, both to experts 0 and 1 with probabilities (1/2, 1/4, 1/8, 1/8): m = (1, 1, 0, 0)
    routing = route(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(2, 1))
    assert loss_of(BALANCERS["aux_loss"](coeff=1.0), routing).item() == pytest.approx(0.75)
    # uniform load gives k / E
    logits = torch.full((4, 4), -30.0)
    for t in range(4):
        logits[t, t] = logits[t, (t + 1) % 4] = 0.0
    assert loss_of(BALANCERS["aux_loss"](coeff=1.0), route(logits)).item() == pytest.approx(K / E)


def test_z_and_entropy_by_hand():
    routing = route(torch.zeros(3, 4))
    assert loss_of(BALANCERS["z_loss"](coeff=2.0), routing).item() == pytest.approx(2 * math.log(4) ** 2)
    assert loss_of(BALANCERS["entropy_loss"](coeff=2.0), routing).item() == pytest.approx(2 * math.log(4))
    peaked = route(torch.tensor([[100.0, 0, 0, 0]]))
    assert loss_of(BALANCERS["entropy_loss"](coeff=1.0), peaked).item() == pytest.approx(0, abs=1e-6)


def test_loss_free_moves_the_bias_by_rate_towards_balance():
    balancer = BALANCERS["loss_free"](rate=0.01)
    load = torch.tensor([[10, 2, 6, 6], [0, 0, 0, 24]])
    bias = balancer.post_step(load, torch.zeros(2, 4))
    assert torch.equal(bias, torch.tensor([[-0.01, 0.01, 0, 0], [0.01, 0.01, 0.01, -0.01]]))
    assert balancer.loss is no_loss


@pytest.mark.parametrize("name", BALANCERS)
class TestContract:
    def test_permuting_experts_permutes_the_result(self, name):
        balancer, order = BALANCERS[name](), torch.tensor([2, 0, 3, 1])
        logits = torch.randn(T, E)
        assert loss_of(balancer, route(logits)).item() == pytest.approx(
            loss_of(balancer, route(logits[:, order])).item(), abs=1e-7
        )
        load, bias = torch.randint(0, 9, (E,)), torch.randn(E)
        assert torch.equal(balancer.post_step(load, bias)[order], balancer.post_step(load[order], bias[order]))

    def test_no_push_at_uniform_load(self, name):
        balancer = BALANCERS[name]()
        bias = torch.randn(E)
        assert torch.equal(balancer.post_step(torch.full((E,), 6), bias), bias)
        # uniform load and uniform probabilities: nothing tells experts apart, so no logit moves against another
        logits = torch.zeros(T, E, requires_grad=True)
        routing = route(logits)
        experts = (torch.arange(T * K) % E).view(T, K)
        even = routing._replace(topk_experts=experts, tokens_per_expert=experts.flatten().bincount(minlength=E))
        loss = loss_of(balancer, even)
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, logits)
            assert (grad - grad.mean(-1, keepdim=True)).abs().max() < 1e-8

    def test_shares_of_micro_batches_add_up(self, name):
        """Each token's part is divided by the tokens of the whole step, so a mean loss is not counted per part."""
        balancer, logits = BALANCERS[name](), torch.randn(T, E)
        parts = [route(part) for part in logits.split(T // 2)]
        added = sum(balancer.loss(part, part.tokens_per_expert, T).item() for part in parts)
        means = [loss_of(balancer, part).item() for part in parts]
        assert added == pytest.approx(sum(means) / 2, rel=1e-5)

    def test_does_something(self, name):
        balancer = BALANCERS[name]()
        assert balancer.loss is not no_loss or balancer.post_step is not keep_bias

    def test_gradient_reaches_the_logits(self, name):
        balancer = BALANCERS[name]()
        if balancer.loss is no_loss:
            pytest.skip("has no loss")
        logits = torch.randn(T, E, requires_grad=True)
        loss_of(balancer, route(logits)).backward()
        assert logits.grad is not None
        assert logits.grad.abs().sum() > 0
