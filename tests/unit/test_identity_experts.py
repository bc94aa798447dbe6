"""Identity experts: the layer is its formula, and routing counts them where experts do not."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Case, build_router, takes_bias
from tests.interop.models import configure
from tests.invariance import EVERYTHING, OWN_ROUTER, assert_same, fresh, outcome
from tests.tiny import adamw, batch, tiny_model
from titan_moe.balancer import BALANCERS, Balancer, no_loss
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.dry_run import check_parts
from titan_moe.metrics import eval_metrics, maxvio, to_numbers, train_metrics
from titan_moe.model.moe import MoE
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.step import evaluate, train_step

D, E, Z, K = 16, 4, 2, 2
ROUTERS = ("topk_softmax", "softmax_topk", "switch", "sigmoid", "base", "sinkhorn", str(OWN_ROUTER))
CASES = {name: OWN_ROUTER if name == str(OWN_ROUTER) else Case(name, {}) for name in ROUTERS}


def layer(case: Case, shared: int = 0, **arguments: Any) -> MoE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": D, "num_experts": E, "num_identity_experts": Z, "expert_dim": 24}
    route = build_router(case.name, **case.arguments)
    biased = takes_bias(case.name)
    moe = MoE(**sizes, route=route, num_shared_experts=shared, expert_bias=biased, **arguments)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def by_formula(moe: MoE, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """sum over a token's choices of weight * E_i(x), where E_i(x) = x for i >= E."""
    rows = []
    for x, ids, weights in zip(x_TD, ids_TK, weights_TK, strict=True):
        y = torch.zeros_like(x)
        for i, weight in zip(ids.tolist(), weights, strict=True):
            if i < E:
                w1, w2, w3 = (w[i] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
                gate = w1 @ x
                y = y + weight * (w2 @ (gate * gate.sigmoid() * (w3 @ x)))
            else:
                y = y + weight * x
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_layer_is_its_formula(name: str, shared: int) -> None:
    """Values and every gradient, worked in float64 with the choices and weights of the router."""
    moe = layer(CASES[name], shared)
    exact = copy.deepcopy(moe).double()
    x_BSD = torch.randn(2, 9, D, requires_grad=True)
    x = x_BSD.detach().double().requires_grad_()
    y_BSD, routing = moe(x_BSD)
    ids_TK, weights_TK = routing.topk_experts, routing.topk_scores.detach().double().requires_grad_()
    assert routing.num_identity_experts == Z
    assert torch.equal(routing.tokens_per_expert, ids_TK.flatten().bincount(minlength=E + Z))
    assert 0 < (ids_TK >= E).sum() < ids_TK.numel()
    want = by_formula(exact, x.flatten(0, 1), ids_TK, weights_TK).view_as(x)
    if exact.shared_experts is not None:
        want = want + exact.shared_experts(x)
    torch.testing.assert_close(y_BSD.double(), want, rtol=1e-5, atol=1e-5)

    # Of the routing the layer gives the gradient of its weights: what a router makes of that has its own tests.
    numbers = torch.linspace(-1, 1, y_BSD.numel()).view_as(y_BSD)
    others = [name for name, _ in moe.named_parameters() if not name.startswith("router")]
    ours, theirs = ([dict(m.named_parameters())[name] for name in others] for m in (moe, exact))
    got = torch.autograd.grad(y_BSD, [routing.topk_scores, *ours, x_BSD], numbers, retain_graph=True)
    expected = torch.autograd.grad(want, [weights_TK, *theirs, x], numbers.double())
    through_weights = torch.autograd.grad(routing.topk_scores, x_BSD, got[0])[0]
    for a, b in zip([*got[:-1], got[-1] - through_weights], expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_weights_of_softmax_topk_are_not_renormalised() -> None:
    """LongCat-Flash: softmax over all N + Z, weights as they are; the bias is in our units, those of logits."""
    moe = layer(CASES["softmax_topk"])
    bias = torch.tensor([0.3, -0.2, 0.0, 0.1, 0.4, -0.3])
    assert moe.expert_bias is not None
    moe.expert_bias.copy_(bias)
    x_TD = torch.randn(7, D)
    y, routing = moe(x_TD.unsqueeze(0))
    exact = copy.deepcopy(moe).double()
    logits = x_TD.double() @ exact.router.weight.T
    s = logits.exp() / logits.exp().sum(-1, keepdim=True)
    ids = (logits + bias).argsort(-1, descending=True)[:, :K]
    assert torch.equal(ids, routing.topk_experts)
    want = by_formula(exact, x_TD.double(), ids, s.gather(-1, ids))
    torch.testing.assert_close(y[0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's, in dynamo
def test_tokens_that_no_expert_computes(tokens: int, grad: bool) -> None:
    """With all choices identity experts' the output is x times the weights' sum, eager and compiled, and no NaN."""
    moe = layer(CASES["topk_softmax"])
    assert moe.expert_bias is not None
    moe.expert_bias.copy_(torch.tensor([0.0] * E + [100.0] * Z))
    x = torch.randn(1, tokens, D)
    with torch.set_grad_enabled(grad):
        for function in (moe, torch.compile(moe, fullgraph=True, backend="aot_eager")):
            moe.zero_grad()
            y, routing = function(x)  # pyrefly: ignore
            assert routing.tokens_per_expert[:E].sum() == 0
            torch.testing.assert_close(y, x)  # the weights of topk_softmax sum to 1
            if grad:
                y.square().sum().backward()
                assert all((w.grad == 0).all() for w in moe.experts.parameters())


def test_bf16_is_rounded_once() -> None:
    moe = layer(CASES["softmax_topk"]).bfloat16()
    moe.expert_bias = torch.tensor([0.0] * E + [100.0] * Z)
    x = torch.randn(1, 64, D).bfloat16()
    y, routing = moe(x)
    want = x[0].double() * routing.topk_scores.double().sum(-1, keepdim=True)
    assert y.dtype == torch.bfloat16
    assert ((y[0].double() - want) / want).abs().max() <= 1.01 * 2**-8


def test_outputs_for_measures_are_zero_where_nothing_is_computed() -> None:
    seen: list[Any] = []

    def measure(outputs: Tensor, routing: Any) -> Tensor:
        seen.append((outputs.detach(), routing))
        return outputs.sum()

    for bias in (0.0, 100.0):  # with the latter not a single choice is an expert's
        moe = layer(CASES["topk_softmax"], measures={"m": measure})
        assert moe.expert_bias is not None
        moe.expert_bias.copy_(torch.tensor([0.0] * E + [bias] * Z))
        x = torch.randn(1, 9, D)
        y, routing = moe(x)
        outputs_TKD, given = seen[-1]
        assert given.num_identity_experts == Z
        assert routing.measures is not None
        is_identity = routing.topk_experts >= E
        assert (outputs_TKD[is_identity] == 0).all()
        weighted = torch.einsum("tkd,tk->td", outputs_TKD, routing.topk_scores.detach())
        identity = (routing.topk_scores * is_identity).sum(-1, keepdim=True) * x[0]
        torch.testing.assert_close(y[0], weighted + identity)


# Steps: metrics, balancers, rates, checkpoints.


def model_of(**arguments: Any) -> Any:
    model = tiny_model("softmax_topk", num_identity_experts=Z, **arguments)
    model.init_weights(0)
    return model


def test_metrics_of_a_step() -> None:
    model = model_of()
    tokens, labels = batch(0)
    _, routings = model(tokens)
    ids = [r.topk_experts.flatten() for r in routings]
    output = train_step(model, [(tokens, labels)], adamw(model), {}, model.expert_biases(), max_norm=1.0)
    (record,) = to_numbers([train_metrics(output)])
    load = torch.stack([i.bincount(minlength=E + Z) for i in ids])
    assert torch.equal(output.load, load[:, :E])
    free = (load[:, E:].sum(-1) / load.sum(-1)).tolist()
    assert [record[f"identity_fraction/layer_{i}"] for i in range(2)] == pytest.approx(free)
    assert record["identity_fraction"] == pytest.approx(sum(free) / 2)
    assert record["experts_per_token"] == pytest.approx(K * (1 - sum(free) / 2))
    assert record["maxvio_batch"] == pytest.approx(maxvio(load[:, :E]).mean().item())
    assert record["dead_experts"] == 0
    assert "dropped_fraction" not in record

    plain = tiny_model()
    plain.init_weights(0)
    output = train_step(plain, [batch(0)], adamw(plain), {}, plain.expert_biases(), max_norm=1.0)
    assert not {"identity_fraction", "experts_per_token"} & train_metrics(output).keys()


def test_metrics_of_an_evaluation() -> None:
    model = model_of()
    batches = [batch(0), batch(1)]
    output = evaluate(model, batches, torch.ones(64, dtype=torch.int64))
    (record,) = to_numbers([eval_metrics(output)])
    with torch.no_grad():
        routings = [model(tokens)[1] for tokens, _ in batches]
    load = torch.stack([sum(r[i].tokens_per_expert for r in routings) for i in range(2)]).double()  # pyrefly: ignore
    l_LE = torch.stack([sum(r[i].scores.double().sum(0) for r in routings) for i in range(2)])  # pyrefly: ignore
    T = 2 * batches[0][0].numel()
    assert record["aux_loss"] == pytest.approx((load / T * l_LE / T).sum(-1).mean().item())
    assert record["maxvio_global"] == pytest.approx(maxvio(load[:, :E]).mean().item())
    assert record["identity_fraction"] == pytest.approx((load[:, E:].sum(-1) / load.sum(-1)).mean().item())
    assert record["experts_per_token"] == pytest.approx(load[:, :E].sum(-1).mean().item() / T)


def test_a_post_step_is_told_how_many_there_are() -> None:
    """LongCat-Flash moves the biases of experts alone, towards K_e * T / E tokens each; worked in float64."""
    wanted, rate = 1.5, 0.1

    def post_step(load: Tensor, expert_bias: Tensor, num_identity_experts: int) -> Tensor:
        tokens = load.sum(-1, keepdim=True) / K
        experts = load.shape[-1] - num_identity_experts
        change = rate * (wanted / K / experts - load / (K * tokens))
        return expert_bias + change * (torch.arange(load.shape[-1]) < experts)

    model = model_of()
    longcat = {"longcat": (1.0, Balancer(no_loss, post_step))}
    bias = torch.zeros(2, E + Z, dtype=torch.float64)
    for number in range(3):
        tokens, labels = batch(number)
        with torch.no_grad():
            load = torch.stack([r.tokens_per_expert for r in model(tokens)[1]]).double()
        train_step(model, [(tokens, labels)], adamw(model), longcat, model.expert_biases(), max_norm=1.0)
        bias[:, :E] += rate * (wanted / K / E - load[:, :E] / (K * tokens.numel()))
        torch.testing.assert_close(torch.stack(model.expert_biases()).double(), bias)
    assert (bias[:, E:] == 0).all()


@pytest.mark.parametrize("rule", ["sign", "proportional", "quantile"])
def test_loss_free_balances_all_alike(rule: str) -> None:
    model = model_of()
    for bias in model.expert_biases():
        bias.copy_(torch.tensor([0.2, 0.0, 0.0, 0.0, 0.2, 0.0]))  # most go to an expert and to an identity expert
    before = model(batch(0)[0])[1][0].tokens_per_expert
    balancers = {"loss_free": (1.0, BALANCERS["loss_free"](rule=rule, rate=0.5 if rule == "quantile" else 0.02))}
    for _ in range(12):
        output = train_step(model, [batch(0)], torch_sgd(model), balancers, model.expert_biases(), max_norm=1.0)
    after = model(batch(0)[0])[1][0].tokens_per_expert
    assert maxvio(after) < 0.5 * maxvio(before)
    assert (output.routing_means["identity_fraction"] - Z / (E + Z)).abs().max() < 0.07


def torch_sgd(model: Any) -> Any:
    return Optimizer.around(torch.optim.SGD(model.parameters(), lr=0.0))


def test_rates_by_load_are_of_experts_alone() -> None:
    model = model_of()
    config = configure(
        **{"moe.num_experts": E, "moe.num_identity_experts": Z, "optimizer.expert.load_lr": "ideal_normalized"}
    )
    output = train_step(
        model, [batch(0)], build_optimizer(config, model), {}, model.expert_biases(), max_norm=1.0, measure_experts=True
    )
    load = output.load.double()
    assert output.load_factors is not None
    torch.testing.assert_close(output.load_factors.double(), load / load.mean(-1, keepdim=True))
    assert output.expert_stats is not None
    assert output.expert_stats.update_ratio.shape == (2, E)


def test_a_checkpoint_goes_on_to_the_bit(tmp_path: Path) -> None:
    def run(model: Any, optimizer: Any, first: int, last: int) -> list[Tensor]:
        balancers = {"loss_free": (1.0, BALANCERS["loss_free"](rate=0.01))}
        return [
            train_step(model, [batch(i)], optimizer, balancers, model.expert_biases(), max_norm=1.0).loss
            for i in range(first, last)
        ]

    model, again = model_of(), model_of()
    optimizer, other = adamw(model), adamw(again)
    run(model, optimizer, 0, 3)
    save_checkpoint(tmp_path, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=other)
    assert run(model, optimizer, 3, 5) == run(again, other, 3, 5)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


# How a step is cut and run.


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("name", ["softmax_topk", str(OWN_ROUTER)])
def test_four_micro_batches_and_checkpointing_equal_one(name: str, mode: str) -> None:
    options: dict[str, Any] = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "compile_blocks": False}
    wrap = partial(parallelize, mesh=None, checkpoint_mode=mode, **options)
    balancers = [Case("aux_loss", {"scope": "global_batch_exact"}), Case("z_loss", {}), EVERYTHING]
    balancers += [] if name == str(OWN_ROUTER) else [Case("loss_free", {"rule": "quantile"})]
    got = outcome(fresh(CASES[name], wrap, num_identity_experts=Z), balancers, micro_batches=4)
    assert_same(got, outcome(fresh(CASES[name], num_identity_experts=Z), balancers))


# Configuration.


IDENTITY = {"moe.num_experts": 4, "moe.num_identity_experts": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"moe.num_identity_experts": -1}, "moe.num_identity_experts"),
        ({"moe.num_experts": 0}, "needs experts, but moe.num_experts is 0"),
        ({"router.name": "expert_choice"}, "does not go with router.name = 'expert_choice'"),
        ({"router.capacity_factor": 1.0}, "does not go with router.capacity_factor"),
        ({"router.num_groups": 2}, "does not go with router.num_groups = 2"),
        ({"optimizer.expert.load_lr": "batch_fraction"}, "does not go with optimizer.expert.load_lr"),
        ({"metrics.balance_tax_freq": 10}, "does not go with metrics.balance_tax_freq = 10"),
        ({"moe.top_k": 5}, "moe.top_k"),
    ],
)
def test_what_does_not_go_with_them_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**{**IDENTITY, **words})


def test_the_dry_run_tries_parts_with_all_that_they_choose_among() -> None:
    check_parts(configure(**IDENTITY, **{"router.name": "examples.router:nearest"}))
    check_parts(configure(**IDENTITY, **{"balancer.tests.parts:everything.coeff": 1.0}))
    check_parts(configure(**IDENTITY, **{"balancer.examples.balancer:rprop.rate": 0.1}))
    with torch.device("meta"):
        model = build_model(configure(**IDENTITY, **{"balancer.loss_free.rate": 0.1}))
    assert model.moe_layers()[0].router.weight.shape[0] == 6
    assert model.expert_biases()[0].shape == (6,)
    assert model.moe_layers()[0].experts.w1.shape[0] == 4
