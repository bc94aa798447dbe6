"""Parts from outside that give what they must not: one line that names them, before data is read."""

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import top_k_of
from tests.interop.models import configure
from tests.invariance import ALL_ROUTERS, partners
from tests.tiny import adamw, batch
from titan_moe.balancer import Balancer, keep_bias, no_loss
from titan_moe.build import build_model
from titan_moe.dry_run import check_parts
from titan_moe.model.routing import ROUTERS, ParametricRouter, Routing, make_routing
from titan_moe.step import train_step

ON_BY_DEFAULT = ("aux_loss", "z_loss", "entropy_loss")
PLAIN = ROUTERS["topk_softmax"](top_k=2)


@pytest.fixture
def part() -> Iterator[ModuleType]:
    """A module `my_moe`, as users have them."""
    module = ModuleType("my_moe")
    sys.modules["my_moe"] = module
    yield module
    del sys.modules["my_moe"]


def failing(logits: Tensor, bias: Tensor | None) -> Any:
    return logits @ logits


class Logits(nn.Module):
    def __init__(self, width: int, scale: Tensor | None = None, buffer: bool = False, name: str = "weight") -> None:
        super().__init__()
        self.add_module(name, nn.Linear(32, width))
        self.scale = nn.Parameter(torch.ones(1) if scale is None else scale)
        if buffer:
            self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x) * self.scale


def own(**arguments: Any) -> ParametricRouter:
    return ParametricRouter(PLAIN, lambda dim, num_experts: Logits(**{"width": num_experts, **arguments}))


def changed(**fields: Any) -> Any:
    """A router whose Routing has other fields."""
    return lambda logits, bias: PLAIN(logits, bias)._replace(**fields)


def unused(used_TK: Tensor) -> Any:
    """A router that gives make_routing this mask."""

    def route(logits: Tensor, bias: Tensor | None) -> Any:
        plain = PLAIN(logits, bias)
        return make_routing(logits, plain.scores, plain.topk_scores, plain.topk_experts, used_TK=used_TK)

    return route


BAD_ROUTERS: list[tuple[Any, str]] = [
    (lambda logits, bias: logits.topk(2), "must return a Routing, gave topk"),
    (lambda logits, bias: None, "must return a Routing, gave NoneType"),
    (changed(scores=torch.zeros(16, 3)), "scores of its Routing must be (16, 8) float32, gave (16, 3) float32"),
    (changed(topk_scores=[0.5]), "topk_scores of its Routing must be (16, 2) float32, gave list"),
    (changed(topk_experts=torch.zeros(16)), "topk_experts must be (16, K) int64, gave (16,) float32"),
    (
        changed(topk_experts=torch.full((16, 2), 9)),
        "topk_experts must be from 0 to 8, gave 9 to 9",
    ),
    (
        changed(tokens_per_expert=torch.zeros(8, dtype=torch.int64)),
        "tokens_per_expert must count topk_experts: let make_routing do it",
    ),
    (changed(kept=torch.ones(16)), "kept of its Routing must be (16, 2) bool, gave (16,) float32"),
    (lambda logits, bias, z: None, "takes 'z', which is not offered: x, router, layer, positions, document_ids are"),
    (
        unused(torch.ones(16, dtype=torch.bool)),
        "used_TK must be a bool for each of topk_experts, (16, 2), is (16,) torch.bool",
    ),
    (
        unused(torch.ones(16, 2)),
        "used_TK must be a bool for each of topk_experts, (16, 2), is (16, 2) torch.float32",
    ),
    (failing, "RuntimeError: mat1 and mat2 shapes cannot be multiplied (16x8 and 16x8)"),
    (own(width=5), "its module must give logits (16, 8) float32, gave (16, 5) float32"),
    (own(scale=torch.ones(())), "parameter scale must be fp32 of one dimension or more, is () float32"),
    (own(buffer=True), "its module must have parameters only, it has a buffer mean"),
    (own(name="experts"), "parameter experts.weight must have another name: that of experts is taken"),
    (ParametricRouter(PLAIN, lambda dim, num_experts: 3), "its init must give a torch.nn.Module, gave int"),
    (3, "must give a function, gave int"),
]


@pytest.mark.parametrize(("router", "message"), BAD_ROUTERS, ids=[message[:40] for _, message in BAD_ROUTERS])
def test_bad_routers(part: ModuleType, router: Any, message: str) -> None:
    part.bad = lambda *, top_k: router  # pyrefly: ignore
    config = configure(**{"router.name": "my_moe:bad", "balancer.loss_free": "false"})
    with pytest.raises(ValueError, match=r"^router my_moe:bad: ") as found:
        check_parts(config)
    text = str(found.value)
    assert message in text
    assert "\n" not in text


def state_of(init: Any, post_step: Any = lambda load, bias, state: (bias, state)) -> Balancer:
    return Balancer(no_loss, post_step, init=init)


def mean_of(num_experts: int) -> dict[str, Tensor]:
    return {"mean": torch.zeros(num_experts)}


def seeing(measure: Any) -> Balancer:
    return Balancer(lambda r, load, n, measure: r.scores.mean(), keep_bias, measure=measure)


def projecting(project: Any) -> Balancer:
    return Balancer(no_loss, keep_bias, project=project)


BAD_BALANCERS: list[tuple[Any, str]] = [
    (lambda load: load, "must give a Balancer, gave function"),
    (Balancer(lambda r, load, n: r.scores.mean(0), keep_bias), "loss must return a scalar tensor, gave (8,) float32"),
    (Balancer(lambda r, load, n: 0.5, keep_bias), "loss must return a scalar tensor, gave float"),
    (Balancer(lambda r, load: r.scores.mean(), keep_bias), "<lambda> at test_dry_run.py:"),
    (Balancer(lambda r, load: r.scores.mean(), keep_bias), " must take 3 arguments by position, and takes 2"),
    (
        Balancer(no_loss, lambda load, bias: bias[0]),
        "post_step must return the expert_bias, (2, 8) float32, gave (8,) float32",
    ),
    (
        Balancer(no_loss, lambda load, bias: None),
        "post_step must return the expert_bias, (2, 8) float32, gave NoneType",
    ),
    (
        Balancer(no_loss, lambda load, bias, weights: bias),
        "takes 'weights', which is not offered: state, step, progress",
    ),
    (
        Balancer(no_loss, lambda load, bias: bias, observe=lambda r, bias: r.scores),
        "observe must return integers, gave",
    ),
    (state_of(None), "an init that makes a state and a post_step that takes `state` belong together"),
    (state_of(mean_of, lambda load, bias: bias), "an init that makes a state and a post_step that takes `state`"),
    (state_of(torch.zeros), "init must return tensors by their names, gave (8,) float32"),
    (state_of(lambda n: {"a": torch.zeros(n).long()}), "init must return fp32 tensors, gave a: (8,) int64"),
    (state_of(lambda n: {"a.b": torch.zeros(n)}), "init must name each tensor as a variable, not 'a.b'"),
    (
        state_of(mean_of, lambda load, bias, state: bias),
        "post_step must return (expert_bias, state), gave (2, 8) float32",
    ),
    (
        state_of(mean_of, lambda load, bias, state: (bias, {"men": bias})),
        "post_step must return the state of ['mean'], gave that of ['men']",
    ),
    (
        state_of(mean_of, lambda load, bias, state: (bias, {"mean": bias[0]})),
        "post_step must return state mean as (2, 8) float32, gave (8,) float32",
    ),
    (
        Balancer(no_loss, lambda load, bias: bias.add_(1)),
        "post_step must return new tensors, and wrote into those that",
    ),
    (
        state_of(mean_of, lambda load, bias, state: (bias, {"mean": state["mean"].add_(1)})),
        "post_step must return new tensors, and wrote into those that it was given",
    ),
    (
        projecting(lambda weights: {name: weight.mul_(0.5) for name, weight in weights.items()}),
        "project must return new tensors, and wrote into those that it was given",
    ),
    (
        Balancer(lambda r, load, n: r.scores.mean(), keep_bias, scope=("sequence", "galaxy")),  # pyrefly: ignore
        "scope must be of micro_batch, sequence, global_batch, global_batch_exact, or several in a tuple, has 'galaxy'",
    ),
    (seeing(lambda speed: speed), "takes 'speed', which is not offered: routing, outputs, w1, w2, w3, expert_ids, "),
    (seeing(lambda router: router.weight), "measure must compute something of a weight, whose memory is freed"),
    (seeing(lambda w1: {"row": w1[0]}), "measure must compute something of a weight, whose memory is freed"),
    (seeing(lambda x: 3), "measure must return tensors, gave int"),
    (Balancer(lambda r, load, n, measure: measure, keep_bias), "a loss that takes `measure` and a function `measure`"),
    (
        Balancer(lambda r, load, n: r.scores.mean(), keep_bias, measure=lambda x: x.mean()),
        "a loss that takes `measure` and a function `measure` belong together",
    ),
    (Balancer(no_loss, keep_bias), "must have a loss, a post_step or a project: it has none of them"),
    (
        Balancer(lambda r, load, n: r.scores.mean(), keep_bias, observe=lambda r, bias: r.tokens_per_expert),
        "its observe is for a post_step, and it has none",
    ),
    (
        Balancer(lambda r, load, n: r.scores.mean(), keep_bias, schedule=lambda progress: 1 - progress),
        "its schedule is for a post_step, and it has none",
    ),
    (Balancer(lambda r, load, n, other: other, keep_bias), "takes 'other', which is not offered: measure, routings, "),
    (projecting(lambda weights: weights["weight"]), "project must return the weights ['weight'], gave (8, 32) float32"),
    (projecting(lambda weights: {}), "project must return the weights ['weight'], gave []"),
    (
        projecting(lambda weights: {"weight": weights["weight"][0]}),
        "project must return weight as (8, 32) float32, gave (32,) float32",
    ),
]


@pytest.mark.parametrize(("balancer", "message"), BAD_BALANCERS, ids=[message[:60] for _, message in BAD_BALANCERS])
def test_bad_balancers(part: ModuleType, balancer: Any, message: str) -> None:
    part.bad = lambda: balancer  # pyrefly: ignore
    config = configure(**{"balancer.my_moe:bad": "true"})
    with pytest.raises(ValueError, match=r"^balancer my_moe:bad: ") as found:
        check_parts(config)
    text = str(found.value)
    assert message in text
    assert "\n" not in text


def test_a_fault_says_where_it_is(part: ModuleType) -> None:
    name = f"{__name__}:make_failing"
    with pytest.raises(
        ValueError,
        match=rf"^router {name}: RuntimeError: .* \(test_dry_run\.py:\d+, tried on 2 sequences of 8 tokens\)$",
    ):
        check_parts(configure(**{"router.name": name}))


def with_weights(logits: Tensor, bias: Tensor | None, weights: Tensor) -> Any:
    return PLAIN(logits, bias)


@pytest.mark.parametrize("router", [with_weights, functools.partial(with_weights)], ids=["function", "partial"])
def test_a_wrong_parameter_says_whose_it_is(part: ModuleType, router: Any) -> None:
    """The function with its file and line, not the line of ours that looked."""
    part.bad = lambda *, top_k: router  # pyrefly: ignore
    line = with_weights.__code__.co_firstlineno
    with pytest.raises(
        ValueError,
        match=rf"^router my_moe:bad: with_weights at test_dry_run\.py:{line} takes 'weights', which is not offered: ",
    ) as found:
        check_parts(configure(**{"router.name": "my_moe:bad"}))
    assert "common.py" not in str(found.value)


def make_unobservant() -> Balancer:
    return Balancer(no_loss, lambda load, bias: bias, observe=lambda routing: routing.tokens_per_expert)


def test_a_function_that_cannot_be_called_says_whose_it_is() -> None:
    """Of those that nobody looks at before they are called, in whose parts no line was reached: who made them."""
    name, line = f"{__name__}:make_unobservant", make_unobservant.__code__.co_firstlineno
    with pytest.raises(
        ValueError,
        match=rf"^balancer {name}: TypeError: .*takes 1 positional argument but 2 were given "
        rf"\(in what make_unobservant at test_dry_run\.py:{line} gives, tried on",
    ):
        check_parts(configure(**{f"balancer.{name}": "true"}))


@dataclass  # with an __eq__ of its own and no __hash__
class WithoutHash:
    names: list[str]

    def __call__(self, logits: Tensor, bias: Tensor | None, layer: int) -> Routing:
        return PLAIN(logits, bias)


@dataclass
class LossWithoutHash:
    names: list[str]

    def __call__(self, routing: Routing, load: Tensor, num_tokens: Tensor | int, index: int) -> Tensor:
        return routing.scores.sum() * (index + 1) / num_tokens


def test_objects_that_have_no_hash_are_parts(part: ModuleType) -> None:
    part.route = lambda *, top_k: WithoutHash(["x"])  # pyrefly: ignore
    part.balance = lambda: Balancer(LossWithoutHash(["x"]), keep_bias)  # pyrefly: ignore
    config = configure(**{"router.name": "my_moe:route", "balancer.my_moe:balance": "true"})
    assert check_parts(config) == []

    # And they are called so in a step, which looks at what a loss asks for each time.
    model = build_model(config)
    model.init_weights(0)
    assert model.moe_layers()[0].asked == ("layer",)
    balancers = {"balance": (1.0, Balancer(LossWithoutHash(["x"]), keep_bias))}
    output = train_step(model, [batch(0)], adamw(model), balancers, model.expert_biases(), max_norm=1.0)
    assert output.balance_losses["balance"].item() == pytest.approx(1.5)  # mean over layers of 1 and 2


CAUTIONS: list[tuple[Any, str]] = [
    (changed(scores=torch.full((16, 8), 0.25)), "the scores of a token sum to 2 over the experts, not to 1, but "),
    (changed(topk_scores=torch.zeros(16, 2)), "topk_scores are all 0: what experts give counts for nothing, and no "),
    (changed(topk_scores=torch.full((16, 2), -1.0)), "topk_scores are all negative: what experts give is subtracted"),
    (unused(torch.zeros(16, 2, dtype=torch.bool)), "no token has an expert: the layer gives nothing but its "),
]


@pytest.mark.parametrize(("router", "message"), CAUTIONS, ids=[message[:30] for _, message in CAUTIONS])
def test_cautions(part: ModuleType, router: Any, message: str) -> None:
    """What is no mistake, but misleads where it is not meant so, is told."""
    part.odd = lambda *, top_k: router  # pyrefly: ignore
    config = configure(**{"router.name": "my_moe:odd", "balancer.loss_free": "false"})
    (caution,) = check_parts(config)
    assert caution.startswith(f"router my_moe:odd: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"name": "orthogonality"}, "balancer.mine compares the experts of a token: it needs moe.top_k of 2 or more"),
        ({"name": "pid", "real_share": 0.5}, "balancer.mine.real_share (0.5) must be 1 without identity experts"),
    ],
)
def test_an_instance_is_named_by_its_table(words: dict[str, Any], message: str) -> None:
    given = {f"balancer.mine.{key}": value for key, value in words.items()}
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        check_parts(configure(**{"moe.top_k": 1, "balancer.loss_free": "false", **given}))


def make_failing(*, top_k: int) -> Any:
    return failing


@pytest.mark.parametrize("router", ALL_ROUTERS, ids=str)
def test_ours_pass(router: Any) -> None:
    """With every balancer that goes with them, and no random state is changed."""
    words: dict[str, Any] = {"router.name": router.name, "moe.top_k": top_k_of(router.name)}
    words |= {f"router.{key}": value for key, value in router.arguments.items()}
    before = torch.get_rng_state()
    for balancer in partners(router):
        given = {f"balancer.{balancer.name}.{key}": value for key, value in balancer.arguments.items()}
        given = given or {f"balancer.{balancer.name}": "true"}
        off = {f"balancer.{name}": "false" for name in ON_BY_DEFAULT if name != balancer.name}
        assert check_parts(configure(**{**words, **off, **given})) == []
    assert torch.equal(torch.get_rng_state(), before)
