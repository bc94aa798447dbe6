"""Contract tests of every router in the registry, and its formulas against hand-worked numbers and transformers."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from titan_moe.model.routing import ROUTERS, Router, Routing, force_balanced

T, E, K = 50, 6, 2


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest) -> Router:
    return ROUTERS[request.param](top_k=K)


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2


def dense(routing: Routing) -> torch.Tensor:
    """(T, E) combine weights: does not depend on the order of a token's choices."""
    return torch.zeros(T, E).scatter(1, routing.topk_experts, routing.topk_scores)


def test_shapes_and_counts(router: Router) -> None:
    routing = router(logits(), None)
    assert routing.tokens_per_expert.sum() == T * K
    assert_close(routing.tokens_per_expert, torch.bincount(routing.topk_experts.flatten(), minlength=E))
    assert routing.topk_experts.shape == routing.topk_scores.shape == (T, K)
    assert routing.topk_experts.min() >= 0
    assert routing.topk_experts.max() < E
    assert all(len(set(row)) == K for row in routing.topk_experts.tolist())
    assert_close(routing.scores.sum(-1), torch.ones(T))
    assert_close(routing.router_logits, logits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_math_is_fp32(router: Router, dtype: torch.dtype) -> None:
    routing, exact = router(logits().to(dtype), None), router(logits().to(dtype).float(), None)
    assert {t.dtype for t in routing[:3]} == {torch.float32}
    assert routing.topk_experts.dtype == routing.tokens_per_expert.dtype == torch.int64
    for got, want in zip(routing, exact, strict=True):
        assert_close(got, want, rtol=0, atol=0)


def test_bias_enters_the_choice_only(router: Router) -> None:
    free, forced = router(logits(), None), router(logits(), torch.tensor([0.0, 0, 0, 50, 0, 0]))
    assert free.tokens_per_expert[3] < T
    assert forced.tokens_per_expert[3] == T
    assert_close(forced.scores, free.scores)
    assert_close(forced.router_logits, free.router_logits)
    # The weights are what they are when the logits alone lead to that choice: those of all others pushed far down.
    others = torch.ones(T, E).scatter(1, forced.topk_experts, 0.0)
    chosen = router(logits() - 1e4 * others, None)
    ratios = [dense(r).gather(1, forced.topk_experts) for r in (forced, chosen)]
    assert_close(ratios[0][:, 0] / ratios[0][:, 1], ratios[1][:, 0] / ratios[1][:, 1], rtol=1e-4, atol=1e-5)


def test_no_bias_is_a_zero_bias(router: Router) -> None:
    for got, want in zip(router(logits(), torch.zeros(E)), router(logits(), None), strict=True):
        assert_close(got, want, rtol=0, atol=0)


def test_permutation_equivariance(router: Router) -> None:
    permutation = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-0.3, 0.3, E)
    plain, moved = router(logits(), bias), router(logits()[:, permutation], bias[permutation])
    assert_close(permutation[moved.topk_experts], plain.topk_experts)
    assert_close(moved.topk_scores, plain.topk_scores)
    assert_close(moved.scores, plain.scores[:, permutation])
    assert_close(moved.tokens_per_expert, plain.tokens_per_expert[permutation])


@pytest.mark.parametrize("output", ["topk_scores", "scores"])
def test_gradient_is_right(router: Router, output: str) -> None:
    """Against a finite difference in fp32, along a random direction."""
    x = logits()[:8].requires_grad_()
    weights = torch.randn(getattr(router(x, None), output).shape, generator=torch.Generator().manual_seed(3))
    direction = torch.randn(8, E, generator=torch.Generator().manual_seed(4))

    def value(z: torch.Tensor) -> torch.Tensor:
        return (getattr(router(z, None), output) * weights).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    assert gradient.abs().sum() > 0
    difference = (value(x + 1e-3 * direction) - value(x - 1e-3 * direction)) / 2e-3
    assert_close((gradient * direction).sum(), difference, rtol=2e-3, atol=2e-3)


def test_same_when_compiled(router: Router) -> None:
    bias = torch.linspace(-1, 1, E)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(logits(), bias), router(logits(), bias), strict=True):
        assert_close(got, want)


def test_ties_are_decided_alike_everywhere(router: Router) -> None:
    one = router(torch.zeros(1, E), None).topk_experts
    for rows in (1, 3, 64):
        many = router(torch.zeros(rows, E), None).topk_experts
        assert (many == one).all()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"top_k": 0}, r"top_k \(0\)"), ({"top_k": 2, "temperature": 0.0}, r"temperature \(0.0\)")],
)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS[name](**arguments)


def test_more_choices_than_experts() -> None:
    with pytest.raises(ValueError, match=r"top_k \(7\) must be at most num_experts \(6\)"):
        ROUTERS["sigmoid"](top_k=7)(logits(), None)


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


def test_force_balanced(router: Router) -> None:
    free, forced = router(logits(), None), force_balanced(router)(logits(), None)
    assert forced.tokens_per_expert.max() - forced.tokens_per_expert.min() <= 1
    assert forced.topk_experts[:4].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert_close(forced.topk_scores, free.scores.gather(1, forced.topk_experts))
    assert_close(forced.scores, free.scores)
