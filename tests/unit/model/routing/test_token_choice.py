"""Contract tests of every router in the registry, and its formulas against hand-worked numbers and transformers."""

import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing import assert_close

from tests.cases import (
    ANY_NUMBER,
    OF_SEQUENCES,
    ROUTER_CASES,
    WHOLE_BATCH,
    Case,
    build_route,
    draws_noise,
    takes_bias,
    top_k_of,
)
from titan_moe.model.routing import ROUTERS, Router, Routing, force_balanced

T, E, K = 50, 6, 2


class Named(NamedTuple):
    case: Case
    route: Router
    top_k: int

    @property
    def drops(self) -> bool:
        return "capacity_factor" in self.case.arguments

    @property
    def whole_batch(self) -> bool:
        return self.case.name in (*WHOLE_BATCH, *OF_SEQUENCES) or self.drops


ALL = [case for case in ROUTER_CASES if not draws_noise(case)]


def named(case: Case) -> Named:
    return Named(case, build_route(case.name, **case.arguments), top_k_of(case.name))


@pytest.fixture(params=ALL, ids=str)
def router(request: pytest.FixtureRequest) -> Named:
    return named(request.param)


@pytest.fixture(params=[case for case in ALL if takes_bias(case.name)], ids=str)
def biased(request: pytest.FixtureRequest) -> Named:
    return named(request.param)


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2


def dense(routing: Routing) -> torch.Tensor:
    """(T, E) combine weights: does not depend on the order of a token's choices."""
    return torch.zeros(T, E + 1).scatter(1, routing.topk_experts, routing.topk_scores)[:, :E]


def assert_same(got: Routing, want: Routing, **tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor):
            assert_close(a, b, **tolerance)
        else:
            assert a == b


def test_shapes_and_counts(router: Named) -> None:
    routing = router.route(logits(), None)
    ids = routing.topk_experts
    assert_close(routing.tokens_per_expert, torch.bincount(ids.flatten(), minlength=E)[:E])
    assert ids.shape == routing.topk_scores.shape
    assert ids.min() >= 0
    assert_close(routing.scores.sum(-1), torch.ones(T))
    assert_close(routing.router_logits, logits())
    if router.case.name in ANY_NUMBER:
        assert routing.kept is not None
        assert torch.equal(ids < E, routing.kept)
        assert router.case.name != "expert_choice" or routing.tokens_per_expert.tolist() == [routing.capacity] * E
        return
    assert ids.shape == (T, router.top_k)
    assert ids.max() < E
    assert routing.tokens_per_expert.sum() == T * router.top_k
    assert all(len(set(row)) == router.top_k for row in ids.tolist())
    assert (routing.kept is not None) == router.drops


def test_nothing_is_kept_over_capacity_and_nothing_lost_under_it(router: Named) -> None:
    routing = router.route(logits(), None)
    if routing.kept is None:
        return
    counts = torch.bincount(routing.topk_experts[routing.kept], minlength=E)
    if routing.has_unused:
        assert torch.equal(counts, routing.tokens_per_expert)
        assert routing.capacity is None or counts.sum() <= E * routing.capacity
    else:
        assert routing.capacity is not None
        assert torch.equal(counts, routing.tokens_per_expert.clamp(max=routing.capacity))
    assert (routing.topk_scores[~routing.kept] == 0).all()
    assert (routing.topk_scores[routing.kept] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_math_is_fp32(router: Named, dtype: torch.dtype) -> None:
    routing, exact = router.route(logits().to(dtype), None), router.route(logits().to(dtype).float(), None)
    assert {t.dtype for t in routing[:3]} == {torch.float32}
    assert routing.topk_experts.dtype == routing.tokens_per_expert.dtype == torch.int64
    assert routing.selection is not None
    assert routing.selection.dtype == torch.float32
    assert_same(routing, exact, rtol=0, atol=0)


def test_bias_enters_the_choice_only(biased: Named) -> None:
    router = biased.route
    free, forced = router(logits(), None), router(logits(), torch.tensor([0.0, 0, 0, 50, 0, 0]))
    assert free.tokens_per_expert[3] < T
    others_decide = biased.case.name in (*OF_SEQUENCES, "token_rounding")
    assert forced.tokens_per_expert[3] > (free.tokens_per_expert[3] if others_decide else T - 1)
    assert_close(forced.scores, free.scores)
    assert_close(forced.router_logits, free.router_logits)
    if biased.case.name != "causal_bias":  # whose own bias goes by the choices
        assert_close(forced.selection, free.selection)
    if biased.top_k == 1 or forced.kept is not None or others_decide:
        assert (forced.topk_scores <= 1).all()
        return
    # The weights are what they are when the logits alone lead to that choice: those of all others pushed far down.
    others = torch.ones(T, E).scatter(1, forced.topk_experts, 0.0)
    chosen = router(logits() - 1e4 * others, None)
    ratios = [dense(r).gather(1, forced.topk_experts) for r in (forced, chosen)]
    assert_close(ratios[0][:, 0] / ratios[0][:, 1], ratios[1][:, 0] / ratios[1][:, 1], rtol=1e-4, atol=1e-5)


def test_no_bias_is_a_zero_bias(biased: Named) -> None:
    assert_same(biased.route(logits(), torch.zeros(E)), biased.route(logits(), None), rtol=0, atol=0)


def test_bias_is_refused_where_it_means_nothing() -> None:
    unbiased = [name for name in ROUTERS if not takes_bias(name)]
    assert unbiased == ["expert_choice", "base", "sinkhorn"]
    for name in unbiased:
        with pytest.raises(ValueError, match=rf"router.name = '{name}' has no selection bias.*loss_free"):
            build_route(name)(logits(), torch.zeros(E))


def test_permutation_equivariance(router: Named) -> None:
    if "num_groups" in router.case.arguments:
        permutation = torch.tensor([5, 3, 4, 1, 0, 2])  # groups as wholes, and within them
    else:
        permutation = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-0.3, 0.3, E) if takes_bias(router.case.name) else None
    plain = router.route(logits(), bias)
    moved = router.route(logits()[:, permutation], None if bias is None else bias[permutation])
    assert_close(dense(moved), dense(plain)[:, permutation], rtol=1e-4, atol=1e-6)
    assert_close(moved.scores, plain.scores[:, permutation])
    assert_close(moved.tokens_per_expert, plain.tokens_per_expert[permutation])


@pytest.mark.parametrize("output", ["topk_scores", "scores"])
def test_gradient_is_right(router: Named, output: str) -> None:
    """Against a finite difference in fp32, along a random direction."""
    x = logits()[:8].requires_grad_()
    weights = torch.randn(getattr(router.route(x, None), output).shape, generator=torch.Generator().manual_seed(3))
    direction = torch.randn(8, E, generator=torch.Generator().manual_seed(4))

    def value(z: torch.Tensor) -> torch.Tensor:
        return (getattr(router.route(z, None), output) * weights).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    assert gradient.abs().sum() > 0
    difference = (value(x + 1e-3 * direction) - value(x - 1e-3 * direction)) / 2e-3
    assert_close((gradient * direction).sum(), difference, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if str(case) != "base-assignment=exact"], ids=str)
def test_same_when_compiled(case: Case) -> None:
    router = named(case)
    bias = torch.linspace(-1, 1, E) if takes_bias(case.name) else None
    compiled = torch.compile(router.route, fullgraph=True, backend="aot_eager")
    assert_same(compiled(logits(), bias), router.route(logits(), bias))


def test_ties_are_decided_alike_everywhere(router: Named) -> None:
    if router.whole_batch:
        return
    one = router.route(torch.zeros(1, E), None).topk_experts
    for rows in (1, 3, 64):
        many = router.route(torch.zeros(rows, E), None).topk_experts
        assert (many == one).all()


def test_without_a_gradient_a_token_chooses_for_itself(router: Named) -> None:
    """Evaluation: no capacity, no assignment; but for those that have no other way."""
    if router.case.name in ("expert_choice", *OF_SEQUENCES):
        return
    with torch.no_grad():
        whole, rows = router.route(logits(), None), [router.route(row.unsqueeze(0), None) for row in logits()]
    assert (whole.kept is None) == (router.case.name != "threshold")
    assert_close(whole.topk_experts, torch.cat([row.topk_experts for row in rows]))
    assert_close(whole.topk_scores, torch.cat([row.topk_scores for row in rows]))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"top_k \(0\)"),
        ({"temperature": 0.0}, r"temperature \(0.0\)"),
        ({"num_groups": 4, "topk_groups": 5}, r"topk_groups \(5\) must be from 1 to router.num_groups \(4\)"),
        ({"jitter": 1.0}, r"jitter \(1.0\)"),
        ({"noise_std": -1.0}, r"noise_std \(-1.0\)"),
        ({"capacity_factor": -1.0}, r"capacity_factor \(-1.0\)"),
        ({"iterations": 0}, r"iterations \(0\)"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    if arguments.keys() <= inspect.signature(ROUTERS[name]).parameters.keys():
        with pytest.raises(ValueError, match=message):
            ROUTERS[name](**{"top_k": top_k_of(name), **arguments})


def test_more_choices_than_experts() -> None:
    with pytest.raises(ValueError, match=r"top_k \(7\) must be at most num_experts \(6\)"):
        ROUTERS["sigmoid"](top_k=7)(logits(), None)


@pytest.mark.parametrize("name", ["switch", "base"])
def test_one_expert_only(name: str) -> None:
    with pytest.raises(ValueError, match=rf"router.name = '{name}' .* one expert: moe.top_k \(2\) must be 1"):
        ROUTERS[name](top_k=2)


def weights_of(name: str, **arguments: Any) -> tuple[list[int], list[float], list[float]]:
    routing = ROUTERS[name](top_k=2, **arguments)(
        torch.tensor([[0.0, math.log(2), math.log(5), math.log(2) - 9]]), None
    )
    return routing.topk_experts[0].tolist(), routing.topk_scores[0].tolist(), routing.scores[0].tolist()


def test_formulas_by_hand() -> None:
    rest = 2 * math.exp(-9)
    experts, weights, scores = weights_of("topk_softmax")
    assert experts == [2, 1]
    assert weights == pytest.approx([5 / 7, 2 / 7])
    assert scores == pytest.approx([x / (8 + rest) for x in (1, 2, 5, rest)])
    assert weights_of("softmax_topk")[1] == pytest.approx([5 / (8 + rest), 2 / (8 + rest)])
    s = [1 / 2, 2 / 3, 5 / 6, rest / (1 + rest)]
    assert weights_of("sigmoid")[1] == pytest.approx([5 / 9, 4 / 9])
    assert weights_of("sigmoid", norm_topk=False, score_scale=3.0)[1] == pytest.approx([2.5, 2.0])
    assert weights_of("sigmoid")[2] == pytest.approx([x / sum(s) for x in s])
    # temperature 1/2 squares the odds
    assert weights_of("topk_softmax", temperature=0.5)[1] == pytest.approx([25 / 29, 4 / 29])
    assert weights_of("softmax_topk", temperature=0.5)[1] == pytest.approx([25 / (30 + rest**2), 4 / (30 + rest**2)])
    assert weights_of("sigmoid", temperature=0.5, norm_topk=False)[1] == pytest.approx([25 / 26, 4 / 5])


@pytest.mark.parametrize(
    ("name", "norm"), [("topk_softmax", True), ("softmax_topk", False)], ids=["topk_softmax", "softmax_topk"]
)
def test_equals_qwen2_moe(name: str, norm: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

    config = Qwen2MoeConfig(num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm, hidden_size=E)
    theirs = Qwen2MoeTopKRouter(config)
    theirs.weight.data = torch.eye(E)
    _, weights, experts = theirs(logits())
    want = torch.zeros(T, E).scatter(1, experts, weights)
    assert_close(dense(ROUTERS[name](top_k=K)(logits(), None)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_equals_glm4_moe(norm: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    config = Glm4MoeConfig(
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
        hidden_size=E,
        moe_intermediate_size=8,
        n_shared_experts=1,
    )
    theirs = Glm4MoeTopkRouter(config)
    bias = torch.linspace(-0.4, 0.4, E)
    theirs.weight.data = torch.eye(E)
    theirs.e_score_correction_bias.copy_(bias)
    _, weights, experts = theirs(logits())
    want = torch.zeros(T, E).scatter(1, experts, weights)
    ours = ROUTERS["sigmoid"](top_k=K, norm_topk=norm, score_scale=2.5)(logits(), bias)
    assert_close(dense(ours), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["topk_softmax", "softmax_topk", "sigmoid", "sinkhorn"])
def test_force_balanced(name: str) -> None:
    router = ROUTERS[name](top_k=K)
    free, forced = router(logits(), None), force_balanced(router)(logits(), None)
    assert forced.tokens_per_expert.max() - forced.tokens_per_expert.min() <= 1
    assert forced.topk_experts[:4].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert_close(forced.topk_scores, free.scores.gather(1, forced.topk_experts))
    assert_close(forced.scores, free.scores)
