"""Each routing method against its definition, by hand or by a loop."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from titan_moe.model.routing import ROUTERS, Routing
from titan_moe.model.routing.batch import auction_assignment, exact_assignment
from titan_moe.model.routing.common import capacity_of, exact_factor

T, E = 24, 6


def logits(seed: int = 0, tokens: int = T, experts: int = E, skew: float = 0.0) -> torch.Tensor:
    noise = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return 2 * noise + skew * torch.linspace(-1, 1, experts)


def route(name: str, z: torch.Tensor, top_k: int = 2, bias: torch.Tensor | None = None, **arguments: Any) -> Routing:
    return ROUTERS[name](top_k=top_k, **arguments)(z, bias)


def test_switch_by_hand() -> None:
    z = torch.tensor([[0.0, math.log(2), math.log(5)], [math.log(3), 0.0, 0.0]])
    routing = route("switch", z, top_k=1)
    assert routing.topk_experts.tolist() == [[2], [0]]
    assert_close(routing.topk_scores, torch.tensor([[5 / 8], [3 / 5]]))
    moved = route("switch", z, top_k=1, bias=torch.tensor([0.0, 2.0, 0.0]))
    assert moved.topk_experts.tolist() == [[1], [1]]
    assert_close(moved.topk_scores, torch.tensor([[2 / 8], [1 / 5]]))


class TestGroups:
    def test_by_hand(self) -> None:
        # groups (0, 1), (2, 3), (4, 5); the best pair sum, not the best expert, wins: top_k / topk_groups = 2
        z = torch.tensor([[4.0, -9, 3, 2, 1, 1]])
        assert route("topk_softmax", z, num_groups=3, topk_groups=1).topk_experts.tolist() == [[2, 3]]
        assert route("topk_softmax", z, num_groups=3, topk_groups=2).topk_experts.tolist() == [[0, 2]]  # best expert
        biased = route("topk_softmax", z, bias=torch.tensor([0, 0, 0, 0, 6.0, 5]), num_groups=3, topk_groups=1)
        assert biased.topk_experts.tolist() == [[4, 5]]
        assert_close(biased.topk_scores, torch.tensor([[0.5, 0.5]]))

    @pytest.mark.parametrize("name", ["topk_softmax", "softmax_topk", "sigmoid"])
    def test_loop(self, name: str) -> None:
        z, bias, K, kept = logits(tokens=40, experts=12), torch.linspace(-0.2, 0.2, 12), 4, 2
        got = route(name, z, K, bias, num_groups=4, topk_groups=kept)
        compared = (z.sigmoid() if name == "sigmoid" else z) + bias
        for t in range(40):
            groups = compared[t].view(4, 3)
            best = sorted(range(4), key=lambda g, groups=groups: -sum(sorted(groups[g].tolist())[-K // kept :]))[:kept]
            allowed = [e for e in range(12) if e // 3 in best]
            want = sorted(allowed, key=lambda e, t=t: -compared[t, e].item())[:K]
            assert got.topk_experts[t].tolist() == want
        assert_close(got.scores, route(name, z, K).scores)

    def test_all_groups_is_no_limit(self) -> None:
        every, free = route("sigmoid", logits(), num_groups=3, topk_groups=3), route("sigmoid", logits())
        assert_close(every.topk_experts, free.topk_experts)

    def test_equals_glm4_moe(self) -> None:
        """Whose group limit is DeepSeek-V3's, with the two best experts of a group: top_k / topk_groups here."""
        pytest.importorskip("transformers")
        from transformers import Glm4MoeConfig
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

        config = Glm4MoeConfig(
            n_routed_experts=12,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            hidden_size=12,
            moe_intermediate_size=8,
        )
        theirs, z = Glm4MoeTopkRouter(config), logits(tokens=40, experts=12)
        theirs.weight.data = torch.eye(12)
        theirs.e_score_correction_bias.copy_(torch.linspace(0, 0.4, 12))
        _, weights, experts = theirs(z)
        ours = route("sigmoid", z, 4, theirs.e_score_correction_bias, num_groups=4, topk_groups=2, score_scale=2.5)
        got = torch.zeros(40, 12).scatter(1, ours.topk_experts, ours.topk_scores)
        assert_close(got, torch.zeros(40, 12).scatter(1, experts, weights), rtol=1e-5, atol=1e-6)

    def test_groups_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"router.num_groups \(4\) must divide moe.num_experts \(6\)"):
            route("sigmoid", logits(), num_groups=4, topk_groups=2)
        with pytest.raises(ValueError, match=r"hold 2 experts, fewer than moe.top_k \(3\)"):
            route("sigmoid", logits(), 3, num_groups=3, topk_groups=1)


class TestNoise:
    @pytest.mark.parametrize("arguments", [{"jitter": 0.3}, {"noise_std": 0.5}])
    def test_it_is_drawn_in_training_only_and_again_by_checkpointing(self, arguments: dict[str, float]) -> None:
        router, z = ROUTERS["topk_softmax"](top_k=2, **arguments), logits().requires_grad_()
        torch.manual_seed(3)
        noisy = router(z, None)
        torch.manual_seed(3)
        again = checkpoint(router, z, None, use_reentrant=False)
        assert_close(noisy.topk_scores, again.topk_scores, rtol=0, atol=0)
        grads = [torch.autograd.grad((r.topk_scores**2).sum() + (r.scores**2).sum(), z)[0] for r in (noisy, again)]
        assert_close(*grads, rtol=0, atol=0)
        assert not torch.equal(noisy.scores, router(z, None).scores)
        assert_close(noisy.router_logits, z)
        with torch.no_grad():
            assert_close(router(z, None).scores, z.softmax(-1))

    def test_sizes(self) -> None:
        z = torch.full((4000, 2), 3.0)
        jittered = route("sigmoid", z, jitter=0.1).selection
        assert jittered is not None
        factor = jittered.logit() / 3
        assert 0.9 - 1e-4 <= factor.min() < 0.905
        assert 1.095 < factor.max() <= 1.1 + 1e-4
        noisy = route("topk_softmax", z, noise_std=0.5).selection
        assert noisy is not None
        assert (noisy - z).std().item() == pytest.approx(0.5, rel=0.05)
        assert (noisy - z).mean().item() == pytest.approx(0, abs=0.03)


class TestCapacity:
    def test_by_position_all_first_choices_go_first(self) -> None:
        # three tokens want experts (0, 1), (0, 1), (1, 0); capacity ceil(3 * 2 / 3 * 1) = 2
        z = torch.tensor([[3.0, 2, 0], [3.0, 2, 0], [2.0, 3, 0]])
        routing = route("topk_softmax", z, capacity_factor=1.0)
        assert routing.capacity == 2
        assert routing.kept is not None
        # expert 0: first choices of tokens 0 and 1 fill it; expert 1: token 2's first, then token 0's second
        assert routing.kept.tolist() == [[True, True], [True, False], [True, False]]
        assert routing.tokens_per_expert.tolist() == [3, 3, 0]

    def test_by_score_the_most_probable_stay(self) -> None:
        z = torch.tensor([[1.0, 0], [3.0, 0], [2.0, 0], [0, 1.0]])
        routing = route("switch", z, 1, capacity_factor=1.0, drop_policy="score")
        assert routing.kept is not None
        assert routing.kept.flatten().tolist() == [False, True, True, True]
        assert_close(routing.topk_scores.flatten(), torch.tensor([0, 3.0, 2, 1]).sigmoid() * torch.tensor([0, 1, 1, 1]))

    @pytest.mark.parametrize("drop_policy", ["position", "score"])
    def test_loop(self, drop_policy: str) -> None:
        z = logits(tokens=60, skew=2.0)
        routing = route("topk_softmax", z, capacity_factor=0.8, drop_policy=drop_policy)
        capacity, p = math.ceil(60 * 2 / E * 0.8), z.softmax(-1)
        choices = [(k, t, int(routing.topk_experts[t, k])) for k in range(2) for t in range(60)]
        if drop_policy == "score":
            choices.sort(key=lambda c: -p[c[1], c[2]].item())
        room, kept = [capacity] * E, torch.zeros(60, 2, dtype=torch.bool)
        for k, t, e in choices:
            kept[t, k] = room[e] > 0
            room[e] -= 1
        assert routing.kept is not None
        assert torch.equal(routing.kept, kept)
        assert not kept.all()

    def test_enough_room_is_dropless(self) -> None:
        free, roomy = route("softmax_topk", logits()), route("softmax_topk", logits(), capacity_factor=float(E))
        assert roomy.kept is not None
        assert roomy.kept.all()
        assert_close(roomy.topk_scores, free.topk_scores)

    @pytest.mark.parametrize(
        ("factor", "room"),
        [(1.1, 110), (1.0, 100), (0.07, 7), (0.29, 29), (0.57, 57), (1.155, 116), (1 / 3, 34), (2 / 3, 67), (2.0, 200)],
    )
    def test_room_is_exact(self, factor: float, room: int) -> None:
        """100 * 1.1 is 110, although floating point has 110.00000000000001; a third is a third."""
        assert capacity_of(200, 2, 4, exact_factor(factor)) == room
        z = torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(200, 1).requires_grad_()  # all tokens choose the same two
        dropped = ROUTERS["topk_softmax"](top_k=2, capacity_factor=factor)(z, None)
        assert dropped.kept is not None
        assert dropped.kept.sum(0).tolist() == [room, room]
        even = ROUTERS["expert_choice"](top_k=2, capacity_factor=factor)(z, None)
        assert even.tokens_per_expert.tolist() == [room] * 4

    def test_extreme_factors(self) -> None:
        assert capacity_of(200, 2, 4, exact_factor(1e308)) == 200
        assert capacity_of(200, 2, 4, exact_factor(1e-300)) == 1
        assert exact_factor(0.0) == (0, 1)
        with pytest.raises(ValueError, match=r"router.capacity_factor \(inf\) must be a finite number"):
            exact_factor(math.inf)


class TestExpertChoice:
    @pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
    @pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 1.7])
    def test_loop(self, order: str, capacity_factor: float) -> None:
        z = logits(skew=1.0)
        routing = route("expert_choice", z, order=order, capacity_factor=capacity_factor)
        capacity = math.ceil(T * 2 / E * capacity_factor)
        compared = z.softmax(-1) if order == "softmax_topk" else z
        want = torch.zeros(T, E)
        for e in range(E):
            tokens = compared[:, e].topk(capacity).indices
            want[tokens, e] = compared[tokens, e] if order == "softmax_topk" else compared[tokens, e].softmax(0)
        assert_close(routing.topk_scores, want)
        assert routing.kept is not None
        assert torch.equal(routing.kept, want > 0)
        assert routing.tokens_per_expert.tolist() == [capacity] * E

    def test_no_more_than_all_tokens(self) -> None:
        assert route("expert_choice", logits(), capacity_factor=9.0).tokens_per_expert.tolist() == [T] * E

    def test_capacity_is_needed(self) -> None:
        with pytest.raises(ValueError, match=r"capacity_factor \(0.0\) must be above 0"):
            route("expert_choice", logits(), capacity_factor=0.0)


def value(z: torch.Tensor, expert_T: torch.Tensor) -> float:
    return z.gather(1, expert_T.unsqueeze(1)).sum().item()


class TestBase:
    SIZES = ((64, 8, 0.0), (64, 8, 4.0), (256, 16, 3.0), (50, 6, 2.0), (3, 5, 1.0), (7, 1, 0.0))

    @pytest.mark.parametrize(("tokens", "experts", "skew"), SIZES)
    def test_auction_is_balanced_and_nearly_optimal(self, tokens: int, experts: int, skew: float) -> None:
        pytest.importorskip("scipy")
        z = logits(1, tokens, experts, skew)
        exact, auction = exact_assignment(z), auction_assignment(z, 16)
        seats = math.ceil(tokens / experts)
        for expert_T in (exact, auction):
            assert expert_T.shape == (tokens,)
            assert torch.bincount(expert_T, minlength=experts).max() <= seats
            assert 0 <= expert_T.min() <= expert_T.max() < experts
        assert value(z, auction) <= value(z, exact) + 1e-3
        assert value(z, exact) - value(z, auction) <= 0.02 * tokens  # logits have a standard deviation of 2
        assert value(z, z.argmax(-1)) >= value(z, exact)

    def test_exact_by_trying_all(self) -> None:
        pytest.importorskip("scipy")
        from itertools import permutations

        z = logits(2, 4, 2, 1.0)
        best = max(set(permutations([0, 0, 1, 1])), key=lambda p: value(z, torch.tensor(p)))
        assert exact_assignment(z).tolist() == list(best)

    def test_auction_ends_balanced_whatever_the_rounds(self) -> None:
        for rounds in (1, 2, 50):
            for z in (logits(3, 48, 6, 5.0), torch.zeros(48, 6), torch.full((48, 6), torch.nan)):
                assert torch.bincount(auction_assignment(z, rounds), minlength=6).tolist() == [8] * 6

    def test_weights_are_sigmoids(self) -> None:
        routing = route("base", logits(), 1)
        assert routing.tokens_per_expert.tolist() == [T // E] * E
        assert_close(routing.topk_scores, logits().gather(1, routing.topk_experts).sigmoid())

    def test_exact_has_a_size(self) -> None:
        pytest.importorskip("scipy")
        with pytest.raises(ValueError, match="up to 2048 tokens of a forward pass, not 2049"):
            route("base", torch.zeros(2049, 2), 1, assignment="exact")
        assert exact_assignment(torch.full((4, 2), torch.nan)).tolist().count(0) == 2  # the step's flag tells of these


class TestSinkhorn:
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_megatrons_iteration(self, top_k: int) -> None:
        """Megatron-core's loop, to a tolerance: the same choice, and the weights of the plain scores."""
        z = logits(tokens=64, skew=1.0) / 2
        cost = z.double().exp()
        d0, d1 = torch.ones(64).double(), torch.ones(E).double()
        for _ in range(1000):
            d0 = 1 / 64 / (d1 * cost).sum(1)
            d1 = 1 / E / (d0.unsqueeze(1) * cost).sum(0)
        plan = d1 * cost * d0.unsqueeze(1)
        routing = route("sinkhorn", z, top_k)
        assert torch.equal(routing.topk_experts, plan.topk(top_k, dim=1).indices)
        weights = z.sigmoid() if top_k == 1 else z.softmax(-1)
        assert_close(routing.topk_scores, weights.gather(1, routing.topk_experts))
        assert routing.selection is not None
        assert_close(routing.selection.exp(), plan.float(), rtol=1e-3, atol=1e-6)

    def test_it_balances(self) -> None:
        z = logits(tokens=600, skew=3.0)
        free, even = (route(name, z).tokens_per_expert for name in ("topk_softmax", "sinkhorn"))
        assert free.max() > 1.7 * free.float().mean()
        assert even.max() < 1.25 * even.float().mean()
