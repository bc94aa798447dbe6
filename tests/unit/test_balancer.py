import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from tests.cases import Case, build_router, cases
from titan_moe.balancer import BALANCERS, Balancer, Scope, margin_counts, quantile_shift
from titan_moe.metrics import maxvio
from titan_moe.model.moe import MEASURED
from titan_moe.model.routing import ROUTERS, Routing
from titan_moe.model.routing.common import asked_for
from titan_moe.step import sequence_load

T, E, K, D, F = 12, 4, 2, 6, 5
CASES = cases(BALANCERS)


def route(logits_TE, name="topk_softmax", bias_E=None):
    return build_router(name)(logits_TE, bias_E)


def loss_of(balancer: Balancer, routing: Routing, sequences: int = 1, num_tokens: int | None = None) -> torch.Tensor:
    load = sequence_load(routing, sequences) if balancer.scope == "sequence" else routing.tokens_per_expert
    return balancer.loss(routing, load, num_tokens or routing.scores.shape[0])


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


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "sigmoid"])
def test_aux_loss_is_megatrons_times_k_over_e(router):
    """Megatron-core: c * E * sum_e(counts_e * sum_t P_te) / (k * N^2), P normalised over experts."""
    logits = torch.randn(T, E)
    p = (
        logits.sigmoid() / (logits.sigmoid().sum(-1, keepdim=True) + 1e-20)
        if router == "sigmoid"
        else logits.softmax(-1)
    )
    counts = logits.topk(K).indices.flatten().bincount(minlength=E)
    megatron = 0.01 * E * (counts * p.sum(0)).sum() / (K * T**2)
    ours = loss_of(BALANCERS["aux_loss"](coeff=0.01), route(logits, router))
    torch.testing.assert_close(ours, K / E * megatron)


def test_aux_loss_of_sequences_is_the_mean_of_theirs():
    logits, balancer = torch.randn(T, E), BALANCERS["aux_loss"](coeff=1.0, scope="sequence")
    whole = BALANCERS["aux_loss"](coeff=1.0)
    expected = sum(loss_of(whole, route(part)) for part in logits.split(T // 3)) / 3
    torch.testing.assert_close(loss_of(balancer, route(logits), sequences=3), expected)
    # DeepSeek-V3, equations 17 to 20: f_i = E / (k T) * counts, P_i = mean probability; ours times E / k
    f = torch.stack([route(part).tokens_per_expert * E / (K * 4) for part in logits.split(4)])
    p = torch.stack([part.softmax(-1).mean(0) for part in logits.split(4)])
    torch.testing.assert_close(E / K * expected, (f * p).sum(-1).mean())


def test_z_and_entropy_by_hand():
    routing = route(torch.zeros(3, 4))
    assert loss_of(BALANCERS["z_loss"](coeff=2.0), routing).item() == pytest.approx(2 * math.log(4) ** 2)
    assert loss_of(BALANCERS["entropy_loss"](coeff=2.0), routing).item() == pytest.approx(2 * math.log(4))
    peaked = route(torch.tensor([[100.0, 0, 0, 0]]))
    assert loss_of(BALANCERS["entropy_loss"](coeff=1.0), peaked).item() == pytest.approx(0, abs=1e-6)


def test_entropy_of_the_mean():
    batch = BALANCERS["entropy_loss"](coeff=2.0, form="batch")
    apart = route(torch.tensor([[100.0, 0, 0, 0], [0, 100, 0, 0]]))  # each peaked, half and half on average
    assert loss_of(batch, apart).item() == pytest.approx(-2 * math.log(2))
    logits = torch.randn(T, E)
    mean = [sum(row[j] for row in logits.softmax(-1).tolist()) / T for j in range(E)]
    assert loss_of(batch, route(logits)).item() == pytest.approx(2 * sum(p * math.log(p) for p in mean), rel=1e-5)


LOAD = torch.tensor([[10, 2, 6, 6], [0, 0, 0, 24]])


def test_loss_free_moves_the_bias_by_rate_towards_balance():
    balancer = BALANCERS["loss_free"](rate=0.01)
    bias = balancer.post_step(LOAD, torch.zeros(2, 4))
    assert torch.equal(bias, torch.tensor([[-0.01, 0.01, 0, 0], [0.01, 0.01, 0.01, -0.01]]))
    assert not balancer.has_loss
    torch.testing.assert_close(BALANCERS["loss_free"]().post_step(LOAD, torch.zeros(2, 4)), bias / 10)


def test_loss_free_proportional_and_recentred():
    proportional = BALANCERS["loss_free"](rate=0.3, rule="proportional").post_step(LOAD, torch.ones(2, 4))
    expected = torch.tensor([[1 - 0.2, 1 + 0.2, 1, 1], [1.3, 1.3, 1.3, 1 - 0.9]])
    torch.testing.assert_close(proportional, expected)
    recentred = BALANCERS["loss_free"](rate=0.3, recenter=True).post_step(LOAD, torch.ones(2, 4))
    torch.testing.assert_close(recentred, torch.tensor([[-0.3, 0.3, 0, 0], [0.15, 0.15, 0.15, -0.45]]))
    assert torch.equal(BALANCERS["loss_free"](rule="proportional").post_step(LOAD * 0, LOAD * 0.0), LOAD * 0.0)


def test_loss_free_decays_at_the_end():
    schedule = BALANCERS["loss_free"](decay_ratio=0.25).schedule
    assert [schedule(p) for p in (0.0, 0.5, 0.75, 0.875, 1.0)] == [1, 1, 1, 0.5, 0]
    assert BALANCERS["loss_free"]().schedule(1.0) == 1


class TestQuantile:
    @pytest.mark.parametrize("router", ["topk_softmax", "sigmoid"])
    def test_it_balances(self, router):
        """A few steps on the same skewed tokens: each expert gets its share."""
        logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(1)) * 2 + torch.linspace(-3, 3, 8)
        balancer, bias = BALANCERS["loss_free"](rule="quantile"), torch.zeros(8)
        violations = []
        for _ in range(8):
            routing = route(logits, router, bias)
            violations.append(maxvio(routing.tokens_per_expert).item())
            assert balancer.observe is not None
            bias = balancer.post_step(balancer.observe(routing, bias), bias)
        assert violations[0] > 1
        assert violations[-1] < 0.1

    def test_shift_is_the_quantile_of_the_margins(self):
        logits, bias = torch.randn(400, E), torch.tensor([0.5, -0.5, 0.0, 1.0])
        routing = route(logits, bias_E=bias)
        shift = quantile_shift(margin_counts(routing, bias))
        biased = logits + bias
        cutoffs = biased.sort(descending=True).values[:, K - 1 : K + 1].mean(-1, keepdim=True)
        margins = cutoffs - biased
        assert torch.equal((margins < 0).sum(0), routing.tokens_per_expert)
        # with its bias changed by the shift, an expert reaches the cutoff of K / E of the tokens, up to a bin's width
        reached = (margins <= shift).sum(0)
        assert (reached - 400 * K / E).abs().max() <= 6
        torch.testing.assert_close(shift, torch.quantile(margins, K / E, dim=0), rtol=0.06, atol=1e-3)

    def test_counts_add_up(self):
        logits, bias = torch.randn(T, E), torch.randn(E)
        whole = margin_counts(route(logits, bias_E=bias), bias)
        parts = sum(margin_counts(route(part, bias_E=bias), bias) for part in logits.split(4))
        assert torch.equal(whole, parts)
        assert whole[:, :-1].sum(-1).tolist() == [T] * E
        assert torch.equal(whole[:, -1], route(logits, bias_E=bias).tokens_per_expert.int())


def layers(case: Case, x_TD: torch.Tensor, rows_ED: torch.Tensor, w_EFD: torch.Tensor, bias=None):
    """A balancer, and the routings of two layers that are alike, with what it measures of linear experts."""
    balancer, routing = BALANCERS[case.name](**case.arguments), route(x_TD @ rows_ED.t(), bias_E=bias)
    if balancer.measure is not None:
        torch.manual_seed(0)
        outputs_TKF = torch.einsum("td,tkfd->tkf", x_TD, w_EFD[routing.topk_experts])
        router = SimpleNamespace(weight=rows_ED)
        values = {
            "routing": routing,
            "outputs": outputs_TKF,
            "router": router,
            "w1": w_EFD,
            "gather_experts": lambda w: w,
        }
        measure = balancer.measure(**{name: values[name] for name in asked_for(balancer.measure, MEASURED, 0)})
        routing = routing._replace(measures={"own": measure})
    return balancer, [routing, routing]


def loss_of_layers(balancer: Balancer, routings: list[Routing], num_tokens: int | None = None) -> torch.Tensor:
    loads = dict.fromkeys(get_args(Scope), routings[1].tokens_per_expert)
    return balancer.loss_of(routings, 1, loads, num_tokens or len(routings[1].scores), "own")


def random_layer():
    """Tokens, router rows and experts."""
    return torch.randn(T, D), torch.randn(E, D), torch.randn(E, F, D)


@pytest.mark.parametrize("case", CASES, ids=str)
class TestContract:
    def test_permuting_experts_permutes_the_result(self, case):
        if str(case) == "erc":
            pytest.skip("draws noise for each expert")
        order, bias = torch.tensor([2, 0, 3, 1]), torch.randn(E)
        x, rows, w = random_layer()
        balancer, plain = layers(case, x, rows, w, bias)
        _, permuted = layers(case, x, rows[order], w[order], bias[order])
        torch.testing.assert_close(loss_of_layers(balancer, plain), loss_of_layers(balancer, permuted))

        state = {} if balancer.init is None else {key: torch.randn_like(v) for key, v in balancer.init(E).items()}
        after = []
        for routings, index in ((plain, torch.arange(E)), (permuted, order)):
            seen = routings[0].tokens_per_expert if not balancer.observe else balancer.observe(routings[0], bias[index])
            own = {key: value[index] for key, value in state.items()}
            after.append(balancer.after_step(seen, bias[index], own, step=1, progress=0.0))
        (moved, kept), (other, other_kept) = after
        torch.testing.assert_close(moved[order], other, rtol=0, atol=1e-6)
        torch.testing.assert_close({key: value[order] for key, value in kept.items()}, dict(other_kept))

    def test_no_push_at_uniform_load(self, case):
        balancer = BALANCERS[case.name](**case.arguments)
        bias = torch.randn(E)
        bias -= bias.mean()
        state = balancer.init(E) if balancer.init else {}
        if balancer.observe is None:
            moved, _ = balancer.after_step(torch.full((E,), 6), bias, state, step=1, progress=0.0)
            torch.testing.assert_close(moved, bias, rtol=0, atol=1e-7)
        if balancer.measure is not None or case.name == "coupling":
            pytest.skip("its loss is not for an even load")
        # uniform load and uniform probabilities: nothing tells experts apart, so no logit moves against another
        logits = torch.zeros(T, E, requires_grad=True)
        routing = route(logits)
        experts = (torch.arange(T * K) % E).view(T, K)
        even = routing._replace(topk_experts=experts, tokens_per_expert=experts.flatten().bincount(minlength=E))
        loss = loss_of(balancer, even)
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, logits)
            assert (grad - grad.mean(-1, keepdim=True)).abs().max() < 1e-8

    def test_shares_of_micro_batches_add_up(self, case):
        """Each token's part is divided by the tokens of the whole step, so a mean loss is not counted per part."""
        x, rows, w = random_layer()
        both = [layers(case, part, rows, w) for part in x.split(T // 2)]
        added = sum(loss_of_layers(*part, num_tokens=T).item() for part in both)
        means = [loss_of_layers(*part).item() for part in both]
        assert added == pytest.approx(sum(means) / 2, rel=1e-5)

    def test_does_something(self, case):
        balancer = BALANCERS[case.name](**case.arguments)
        assert balancer.has_loss or balancer.moves_bias or balancer.project

    def test_gradient_reaches_router_or_experts(self, case):
        x, rows, w = random_layer()
        rows.requires_grad_()
        w.requires_grad_()
        balancer, routings = layers(case, x, rows, w)
        if not balancer.has_loss:
            pytest.skip("has no loss")
        loss_of_layers(balancer, routings).backward()
        grads = [weight.grad for weight in (rows, w) if weight.grad is not None]
        assert sum(grad.abs().sum() for grad in grads) > 0
