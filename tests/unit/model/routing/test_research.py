"""Routers of recent papers against plain float64 loops over their formulas, and what goes together with them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.interop.models import configure
from titan_moe.balancer import BALANCERS
from titan_moe.build import build_router, degrees_of
from titan_moe.config.checks import cautions, check_combinations
from titan_moe.dry_run import check_parts
from titan_moe.estimate.simulate import rows_sent
from titan_moe.generate import CACHEABLE_ROUTERS
from titan_moe.model.routing import ROUTERS, ParametricRouter, Router, Routing, force_balanced, make_routing
from titan_moe.step import routing_means, routing_sums

B, S, E, K, D = 2, 12, 6, 2, 10
T = B * S
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
POSITIONS = torch.arange(S).expand(B, S)
BIAS = torch.linspace(-0.2, 0.2, E)


def logits(seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2


def dense(routing: Routing) -> Tensor:
    """The weights of all experts, (T, E), 0 where a token has not the expert."""
    return torch.zeros(T, E + 1).scatter(1, routing.topk_experts, routing.topk_scores)[:, :E]


def assert_weights(route: Callable[[Tensor], Routing], formula: Callable[[Tensor], Tensor]) -> None:
    """Weights and the gradient through them equal those of a formula in float64."""
    x, exact = logits().requires_grad_(), logits().double().requires_grad_()
    got, want = dense(route(x)), formula(exact)
    assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    direction = torch.linspace(-1, 1, T * E).view(T, E)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    assert exact.grad is not None
    assert exact.grad.any()
    assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)  # pyrefly: ignore


def logits_of(name: str, **arguments: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits (T, E) of a router's module for an input (T, D), and the weights of both in float64."""
    init = ROUTERS[name](top_k=K, latent_dim=5, **arguments).init
    module: nn.Module = init(D, E)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.7)
    x = torch.randn(T, D)
    return module(x), x.double(), {name: weight.detach().double() for name, weight in module.named_parameters()}


def test_cosine() -> None:
    got, x, w = logits_of("cosine", temperature=0.3)
    for t in range(T):
        z = w["project.weight"] @ x[t]
        for e in range(E):
            cosine = z @ w["vectors"][e] / math.sqrt(z @ z) / math.sqrt(w["vectors"][e] @ w["vectors"][e])
            assert_close(got[t, e].double(), cosine / (0.3 * w["temperature"][0]), rtol=1e-4, atol=1e-5)


def test_mlp() -> None:
    got, x, w = logits_of("mlp")

    def gelu(z: Tensor) -> Tensor:
        return z * (1 + torch.special.erf(z / math.sqrt(2))) / 2

    for t in range(T):
        h = w["project.weight"] @ x[t] + w["project.bias"]
        u = w["norm.weight"] * h / torch.sqrt((h * h).mean() + 1e-5)
        h = gelu(w["w2.weight"] @ gelu(w["w1.weight"] @ u + w["w1.bias"]) + w["w2.bias"])
        assert_close(got[t].double(), w["w3.weight"] @ h, rtol=1e-4, atol=1e-5)


def test_prototype() -> None:
    got, x, w = logits_of("prototype")
    for t in range(T):
        centred = x[t] - x[t].mean()
        u = w["norm.weight"] * centred / torch.sqrt((centred * centred).mean() + 1e-5) + w["norm.bias"]
        mean = w["encode.weight"] @ (u / (1 + torch.exp(-u))) + w["encode.bias"]
        for e in range(E):
            key = w["prototypes"][e]
            cosine = mean @ key / math.sqrt(mean @ mean) / math.sqrt(key @ key)
            assert_close(got[t, e].double(), cosine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_k", [3, 6])
def test_threshold(max_k: int) -> None:
    def formula(z: Tensor) -> Tensor:
        s = 1 / (1 + torch.exp(-z))
        fires = s - (0.5 - BIAS.double()) > 0  # beta = 1/2 - bias
        rank = (s + BIAS).argsort(descending=True).argsort()
        return 1.5 * s * (fires & (rank < max_k))

    route = ROUTERS["threshold"](top_k=K, max_k=max_k, score_scale=1.5)
    assert_weights(lambda z: route(z, BIAS), formula)
    counts = (dense(route(logits(), BIAS)) > 0).sum(1)
    assert counts.min() < K < counts.max() <= max_k
    loads = {"load": torch.ones(1, E), "identity_load": torch.ones(1, 0)}
    means = routing_means({**routing_sums([route(logits(), BIAS)]), **loads})
    assert means["experts_per_token"].item() == pytest.approx(counts.sum().item() / T)
    assert means["dropped_fraction"].item() == 0


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_quantile_gives_a_threshold_its_average(rate: float) -> None:
    """beta <- (1 - rate) beta + rate q, q the (1 - K/E) quantile of the scores: Su's rule, whose 1 - rate is 0.9."""
    z = torch.randn(4000, E) * torch.linspace(0.5, 2, E) + torch.linspace(-1, 1, E)
    route, balancer = ROUTERS["threshold"](top_k=K, max_k=E), BALANCERS["loss_free"](rule="quantile", rate=rate)
    observed = balancer.observe(route(z, BIAS), BIAS)
    moved = balancer.post_step(observed, BIAS)
    q = torch.quantile(z.double().sigmoid(), 1 - K / E, dim=0)
    want = (1 - rate) * (0.5 - BIAS.double()) + rate * q
    assert_close(0.5 - moved.double(), want, rtol=0, atol=0.01)

    # From there it comes to the average, which micro-batches count together.
    for _ in range(math.ceil(10 / rate)):
        parts = [balancer.observe(route(part, moved), moved) for part in z.chunk(4)]
        assert torch.equal(sum(parts), balancer.observe(route(z, moved), moved))
        moved = balancer.post_step(sum(parts), moved)
    assert_close(route(z, moved).tokens_per_expert / 4000, torch.full((E,), K / E), rtol=0.02, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_token_rounding(rounding: Any) -> None:
    tile = 4

    def formula(z: Tensor) -> Tensor:
        p, biased, weights = z.softmax(-1), z + BIAS, torch.zeros(T, E, dtype=torch.float64)
        chosen = [set(biased[t].topk(K).indices.tolist()) for t in range(T)]
        for e in range(E):
            own = [t for t in range(T) if e in chosen[t]]
            others = sorted((t for t in range(T) if e not in chosen[t]), key=lambda t: -p[t, e].item())
            share = {t: p[t, e] / sum(p[t, j] for j in chosen[t]) for t in own}
            own.sort(key=lambda t: -share[t].item())
            up = {"nearest": round(len(own) / tile), "up": math.ceil(len(own) / tile), "down": len(own) // tile}
            for t in [*own, *others][: up[rounding] * tile]:
                weights[t, e] = share.get(t, p[t, e])
        return weights

    route = ROUTERS["token_rounding"](top_k=K, tile=tile, rounding=rounding)
    assert_weights(lambda z: route(z, BIAS), formula)
    load = route(logits(), BIAS).tokens_per_expert
    assert (load % tile == 0).all()
    with torch.no_grad():
        plain = ROUTERS["topk_softmax"](top_k=K)(logits(), BIAS)
        assert_close(dense(route(logits(), BIAS)), dense(plain))


def test_causal_bias() -> None:
    rate = 0.3

    def formula(z: Tensor) -> Tensor:
        s = 1 / (1 + torch.exp(-z.view(B, S, E)))
        weights = torch.zeros(B, S, E, dtype=torch.float64)
        for b in range(B):
            beta = torch.zeros(E, dtype=torch.float64)
            for t in range(S):
                ids = (s[b, t] - beta + BIAS).topk(K).indices
                weights[b, t, ids] = s[b, t, ids] / s[b, t, ids].sum()
                load = torch.zeros(E, dtype=torch.float64).index_fill(0, ids, 1 / K)
                beta = beta + rate * (load - 1 / E)
        return weights.view(T, E)

    route = ROUTERS["causal_bias"](top_k=K, rate=rate).route
    assert_weights(lambda z: route(z, BIAS, POSITIONS), formula)
    plain = ROUTERS["sigmoid"](top_k=K)(logits(), BIAS)
    routing = route(logits(), BIAS, POSITIONS)
    assert routing.tokens_per_expert.float().std() < 0.6 * plain.tokens_per_expert.float().std()
    assert_close((routing.selection + BIAS).topk(K).indices, routing.topk_experts)

    # Causal: another token changes nothing before it, and in its sequence much after it.
    other = logits()
    other[5] = -other[5]
    changed = (dense(route(other, BIAS, POSITIONS)) != dense(routing)).any(1).nonzero().flatten().tolist()
    assert changed[0] == 5
    assert 5 < changed[-1] < S


@pytest.mark.parametrize("norm", [False, True])
def test_emo(norm: bool) -> None:
    def formula(z: Tensor) -> Tensor:
        p, weights = z.softmax(-1).view(B, S, E), torch.zeros(B, S, E, dtype=torch.float64)
        for b in range(B):
            for t in range(S):
                document = p[b, DOCUMENTS[b] == DOCUMENTS[b, t]].sum(0)
                pool = document.topk(3).indices
                ids = pool[(z.view(B, S, E)[b, t] + BIAS)[pool].topk(K).indices]
                total = p[b, t, ids].sum() if norm else 1
                weights[b, t, ids] = p[b, t, ids] / total
        return weights.view(T, E)

    route = ROUTERS["emo"](top_k=K, min_pool=3, max_pool=3, norm_topk=norm).route
    assert_weights(lambda z: route(z, BIAS, DOCUMENTS), formula)


def pool_sizes(route: Router, seed: int) -> list[int]:
    """How many experts each of 2000 documents of 40 tokens uses."""
    torch.manual_seed(seed)
    documents = torch.arange(2000).repeat_interleave(40).unsqueeze(0)
    ids = route(torch.randn(80_000, E), None, documents).topk_experts.view(2000, -1)
    return [len(set(row)) for row in ids.tolist()]


def test_emo_draws_its_pools_in_training() -> None:
    route = ROUTERS["emo"](top_k=K, min_pool=3, max_pool=5).route
    sizes = pool_sizes(route, 0)
    assert {size: sizes.count(size) / 2000 for size in (3, 4, 5)} == pytest.approx(
        dict.fromkeys((3, 4, 5), 1 / 3), abs=0.05
    )
    assert sizes == pool_sizes(route, 0) != pool_sizes(route, 1)
    with torch.no_grad():
        assert set(pool_sizes(route, 0)) == {4}
        assert set(pool_sizes(ROUTERS["emo"](top_k=K, eval_pool=5).route, 0)) == {5}


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"router.name": "threshold", "moe.top_k": 2, "router.max_k": 1},
        r"router\.max_k \(1\) must be at least moe\.top_k \(2\)",
    ),
    ({"router.name": "emo", "moe.top_k": 2, "router.max_pool": 1}, r"router\.max_pool \(1\) must be in this order"),
    ({"router.name": "emo", "router.eval_pool": 5}, r"router\.eval_pool \(5\) must be from"),
    ({"router.name": "threshold", "balancer.loss_free": "true"}, r"balancer\.loss_free evens .* rule = \"quantile\""),
    (
        {"router.name": "emo", "balancer.loss_free.rule": "quantile"},
        r"router\.name = 'emo' takes others, too, or not all of these: take rule = \"sign\"",
    ),
    (
        {"router.name": "token_rounding", "balancer.aux_loss.scope": "global_batch_exact"},
        r"router\.name = 'token_rounding' the second time differs: take scope",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_does_not_go_together(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        check_combinations(configure(**{"moe.num_experts": 4, **words}))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["causal_bias", "emo", "tests.unit.model.routing.test_research:looks_back"])
@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_parts_of_sequences_are_refused(name: str, axis: str) -> None:
    words = {"router.name": name, f"parallelism.{axis}_parallel_degree": 2}
    message = (
        rf"router\.name = '{name}' looks at whole sequences, .* parallelism\.{axis}_parallel_degree = 2: set it to 1"
    )
    with pytest.raises(ValueError, match=message):
        degrees_of(configure(**words), 2)
    assert degrees_of(configure(**{"router.name": name}), 2).data == 2


def looks_back(*, top_k: int) -> ParametricRouter:
    """A router without parameters that says what it needs."""
    return ParametricRouter(ROUTERS["topk_softmax"](top_k=top_k), whole_sequences=True)


def above_mean(*, top_k: int) -> Router:
    """Of the best top_k those above the mean: slots stay unused."""

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        best = router_logits_TE.topk(top_k, dim=-1)
        used_TK = best.values > best.values.mean(-1, keepdim=True)
        scores_TE = router_logits_TE.softmax(-1)
        return make_routing(
            router_logits_TE, scores_TE, best.values.softmax(-1), best.indices, router_logits_TE, used_TK=used_TK
        )

    return route


def test_own_unused_slots() -> None:
    name = "tests.unit.model.routing.test_research:above_mean"
    check_parts(configure(**{"router.name": name}))
    with pytest.raises(ValueError, match=r"^balancer loss_free: rule = 'quantile' needs a router that uses all"):
        check_parts(configure(**{"router.name": name, "balancer.loss_free.rule": "quantile"}))
    routing = above_mean(top_k=2)(logits(), None)
    assert routing.tokens_per_expert.sum() == T
    assert (routing.topk_experts[:, 1] == E).all()
    dealt = force_balanced(above_mean(top_k=2))(logits(), None)
    assert dealt.tokens_per_expert.tolist() == [T // E] * E


def test_rows_that_are_sent() -> None:
    def rows(name: str, **arguments: Any) -> int:
        words = {f"router.{key}": value for key, value in arguments.items()}
        return rows_sent(configure(**{"router.name": name, "moe.num_experts": 4, "moe.top_k": 2, **words}), 2, 64)

    assert rows("topk_softmax") == rows("mlp") == rows("emo") == rows("causal_bias") == 256
    assert rows("threshold") == 512
    assert rows("threshold", max_k=3) == 384
    assert rows("token_rounding", tile=16) == 256 + 4 * 8
    assert rows("token_rounding", tile=16, rounding="up") == 256 + 4 * 15


def test_what_a_run_is_told() -> None:
    for name, words in (("emo", "in training and in evaluation"), ("token_rounding", "in training: a causal model")):
        assert any(words in said for said in cautions(configure(**{"router.name": name})))
    alone = {"router.name": "threshold", "balancer.aux_loss": "true"}
    assert any("on average only where something moves" in said for said in cautions(configure(**alone)))
    moved = {"router.name": "threshold", "balancer.loss_free.rule": "quantile"}
    assert not any("on average" in said for said in cautions(configure(**moved)))
    assert {*ROUTERS} - {*CACHEABLE_ROUTERS} == {"expert_choice", "causal_bias", "emo"}
    assert build_router(configure(**{"router.name": "emo", "debug.force_balanced_routing": "true"})).whole_sequences
