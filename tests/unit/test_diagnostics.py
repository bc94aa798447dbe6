"""Routing drift and the balance tax: their definitions, and that training does not notice them."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import adamw, balancers, batch, steps, tiny_model
from titan_moe import diagnostics
from titan_moe.config import load_config
from titan_moe.diagnostics import NO_EXPERT, balance_tax, routing_choices, routing_drift
from titan_moe.model.moe import MoE
from titan_moe.model.routing import ROUTERS
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.step import IGNORE, evaluate, train_step


def fresh(**arguments):
    model = tiny_model(**arguments)
    model.init_weights(0)
    return model


@pytest.mark.parametrize(
    ("before", "after", "drift"),
    [
        ([[0, 1], [2, 3]], [[0, 1], [2, 3]], 0.0),
        ([[0, 1], [2, 3]], [[1, 0], [3, 2]], 0.0),  # the order does not matter
        ([[0, 1], [2, 3]], [[0, 2], [2, 3]], 0.25),
        ([[0, 1], [2, 3]], [[2, 3], [0, 1]], 1.0),
        ([[0, 1], [2, NO_EXPERT]], [[0, 2], [NO_EXPERT, NO_EXPERT]], 0.5),
        ([[0, NO_EXPERT], [2, 3]], [[0, 1], [2, 3]], 0.25),
        ([[NO_EXPERT, NO_EXPERT]], [[NO_EXPERT, NO_EXPERT]], math.nan),
        ([[0, 1]], [[0, 1], [2, 3]], math.nan),  # another batch
    ],
)
def test_routing_drift(before, after, drift):
    assert routing_drift(torch.tensor([before]), torch.tensor([after])) == pytest.approx(drift, nan_ok=True)


def test_choices_are_the_routers():
    model, (tokens, labels) = fresh(), batch(0)
    labels[:, :3] = IGNORE
    choices = routing_choices(model, tokens, labels)
    _, routings = model(tokens)
    assert choices.shape == (2, tokens.numel(), 2)
    counted = (labels != IGNORE).flatten()
    for layer, routing in zip(choices, routings, strict=True):
        assert torch.equal(layer[counted].long(), routing.topk_experts[counted])
        assert (layer[~counted] == NO_EXPERT).all()
    assert routing_drift(choices, routing_choices(model, tokens, labels)) == 0
    steps(model, 20)
    assert 0 < routing_drift(choices, routing_choices(model, tokens, labels)) < 1


def test_balance_tax_is_the_ratio_of_the_medians(monkeypatch):
    """Learned passes take 2, 4, 9 seconds, balanced ones 1, after a first pass of each, which does not count."""
    model, loads = fresh(), []
    times = iter([50.0, 50.0, 2.0, 1.0, 4.0, 1.0, 9.0, 1.0])

    def seconds(model, tokens, labels):
        loads.append(model(tokens)[1][0].tokens_per_expert.unique().numel())
        return next(times)

    monkeypatch.setattr(diagnostics, "_seconds", seconds)
    assert balance_tax(model, *batch(0)) == 0.25
    assert loads[1::2] == [1] * 4  # every expert alike
    assert min(loads[::2]) > 1


def test_balance_tax_sees_a_slow_router(monkeypatch):
    choose, clock = ROUTERS["topk_softmax"](top_k=2), [0.0]

    def taking(seconds):
        def route(logits, bias):
            clock[0] += seconds
            return choose(logits, bias)

        return route

    model, forced = fresh(), diagnostics._forced
    for module in model.modules():
        if isinstance(module, MoE):
            module.route = taking(4.0)
    monkeypatch.setattr(diagnostics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(diagnostics, "_forced", lambda route: forced(taking(1.0)))
    assert balance_tax(model, *batch(0), repeats=1) == pytest.approx(0.25)


def noisy(logits, bias):
    return ROUTERS["topk_softmax"](top_k=2)(logits + torch.rand_like(logits), bias)


def test_balance_tax_changes_nothing():
    """Routers with noise draw from the generator that training draws from, too."""
    results = []
    for measure in (False, True):
        model = fresh()
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        for layer in layers:
            layer.route = noisy
        torch.manual_seed(0)
        steps(model, 1)
        if measure:
            assert balance_tax(model, *batch(1), repeats=1) > 0
            assert all(layer.route is noisy for layer in layers)
            assert all(p.grad is None for p in model.parameters())
        results.append([*(o.loss for o in steps(model, 2)), *model.parameters(), *model.expert_biases()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_routers_are_put_back_when_a_pass_fails(monkeypatch):
    model = fresh()
    before = [module.route for module in model.modules() if isinstance(module, MoE)]

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(diagnostics, "_seconds", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        balance_tax(model, *batch(0))
    assert [module.route for module in model.modules() if isinstance(module, MoE)] == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--metrics.balance_tax_freq=x"], "must be a valid integer"),
        (["--metrics.balance_tax_freq=5", "--moe.num_experts=0"], "metrics.balance_tax_freq = 5 needs experts"),
        (["--metrics.balance_tax_freq=5", "--debug.force_balanced_routing"], "compares learned with balanced routing"),
    ],
)
def test_configuration_refuses(args, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config(args)
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of dynamo
def test_a_compiled_model_is_evaluated_and_timed_whatever_it_consists_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and MoE layers, batches of one row, some and many, and balanced routing are graphs of one piece of code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    model = tiny_model(num_layers=3, first_dense_layers=1)
    whole = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "checkpoint_mode": "none"}
    parallelize(model, mesh=None, compile_blocks=True, **whole)
    model.init_weights(0)
    (tokens, labels), counts = batch(0), torch.ones(64)
    for rows in (8, 4, 1, 3):
        micro = [(tokens[:rows], labels[:rows])]
        train_step(model, micro, adamw(model), balancers(), model.expert_biases(), max_norm=1.0)
        evaluate(model, micro, counts)
        balance_tax(model, *micro[0], repeats=1)
    torch.compiler.reset()
