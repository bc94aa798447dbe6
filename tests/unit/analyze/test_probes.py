"""Kept sequences, outputs of all experts, and losses without some of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import batch, tiny_model
from titan_moe.analyze.probes import (
    agreement,
    batches_of,
    changed_sets,
    keep_sequences,
    loss_without,
    of_all_ranks,
    output_similarity,
    prune,
    route_without,
    without_experts,
)
from titan_moe.model.routing import ROUTERS
from titan_moe.model.routing.common import parametric
from titan_moe.model.transformer import Transformer

E, L = 4, 2


def model_of(router: str, **arguments: object) -> Transformer:
    model = tiny_model(router, **arguments)
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1  # so that experts differ in what they say
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.2, 0.2, bias.numel()))
    return model.eval()


def test_kept_sequences_have_the_choices_of_their_tokens() -> None:
    model = model_of("topk_softmax")
    tokens, labels = batch(0, sequences=3)
    with torch.no_grad():
        _, routings = model(tokens, want="routings")
    sequences = keep_sequences(1, range(5, 7), tokens, labels, routings)
    assert [(one.text, one.number) for one in sequences] == [(1, 5), (1, 6)]
    for i, one in enumerate(sequences):
        assert torch.equal(one.tokens, tokens[i])
        assert torch.equal(one.labels, labels[i])
        for layer, routing in enumerate(routings):
            for s in range(tokens.shape[1]):
                t = i * tokens.shape[1] + s
                pairs = zip(routing.topk_scores[t].tolist(), routing.topk_experts[t].tolist(), strict=True)
                expected = sorted(pairs, key=lambda pair: -pair[0])
                assert one.experts[layer, s].tolist() == [expert for _, expert in expected]
                assert one.weights[layer, s].tolist() == [weight for weight, _ in expected]
    assert of_all_ranks(sequences[::-1]) == sequences
    (first, _), *rest = batches_of(sequences, 6, 8, torch.device("cpu"))
    assert torch.equal(first, tokens[:1])
    assert not rest


def test_a_token_that_no_expert_takes_has_none() -> None:
    model = model_of("expert_choice")
    tokens, labels = batch(0, sequences=2)
    with torch.no_grad():
        _, routings = model(tokens, want="routings")
    sequences = keep_sequences(0, range(2), tokens, labels, routings)
    experts = torch.cat([one.experts for one in sequences], dim=1)  # (L, T, E)
    for layer, routing in enumerate(routings):
        for chosen, ids in zip(experts[layer].tolist(), routing.topk_experts.tolist(), strict=True):
            count = sum(e < E for e in ids)
            assert sorted(chosen[:count]) == [e for e in ids if e < E]
            assert chosen[count:] == [-1] * (E - count)


def test_outputs_of_all_experts_are_compared() -> None:
    """Each expert by its three matrices, on the layer's input as a plain pass through the blocks gives it."""
    model = model_of("topk_softmax")
    tokens, labels = batch(0, sequences=2)
    found = output_similarity(model, [(tokens, labels)])
    expected = torch.zeros(L, E, E, dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    for layer in model.moe_layers():
        layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(tokens, want="routings")
        for layer, x in enumerate(inputs):
            experts = model.moe_layers()[layer].experts
            outputs = [(F.silu(x @ experts.w1[e].t()) * (x @ experts.w3[e].t())) @ experts.w2[e].t() for e in range(E)]
            for i in range(E):
                for j in range(E):
                    expected[layer, i, j] = F.cosine_similarity(outputs[i], outputs[j]).double().mean()
    assert found.flatten().tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "sigmoid"])
def test_the_loss_without_an_expert_is_that_of_a_model_that_never_had_it(router: str) -> None:
    """A model of three experts with the weights of those that stay, which differ from layer to layer."""
    model = model_of(router)
    pair = batch(1, sequences=4)
    gone = [2, 0]
    pruned = model_of(router, num_experts=E - 1)
    weights = model.state_dict()
    for layer, expert in enumerate(gone):
        rows = [e for e in range(E) if e != expert]
        for name in ("experts.w1", "experts.w2", "experts.w3", "router.weight", "expert_bias"):
            key = f"layers.{layer}.moe.{name}"
            weights[key] = weights[key][rows]
    pruned.load_state_dict(weights)
    removed = F.one_hot(torch.tensor(gone), E).bool()
    routes = [layer.route for layer in model.moe_layers()]
    with torch.no_grad():
        expected = (pruned(*pair)[0] / pair[1].numel()).item()
        whole = (model(*pair)[0] / pair[1].numel()).item()
    assert loss_without(model, [pair], removed) == pytest.approx(expected, rel=1e-6)
    assert abs(expected - whole) > 1e-5
    assert [layer.route for layer in model.moe_layers()] == routes
    with without_experts(model, removed), torch.no_grad():
        _, routings = model(pair[0], want="routings")
    for routing, expert in zip(routings, gone, strict=True):
        assert routing.tokens_per_expert[expert] == 0


@pytest.mark.parametrize("with_bias", [False, True])
def test_an_expert_that_is_away_stays_away_whatever_the_loads_before(with_bias: bool) -> None:
    """A causal bias, that lowers the scores of all others below the sigmoid of a logit of -inf."""
    causal_bias = parametric(ROUTERS["causal_bias"](top_k=2, rate=1.0))
    generator = torch.Generator().manual_seed(0)
    removed = F.one_hot(torch.tensor(3), 4).bool()
    bias = torch.zeros(4) if with_bias else None
    positions = torch.arange(32).expand(2, 32)
    routing = route_without(causal_bias.route, removed)(
        torch.randn(64, 4, generator=generator), bias, positions=positions
    )
    assert routing.tokens_per_expert[3] == 0
    assert routing.tokens_per_expert.sum() == 128


def test_pruning_takes_the_least_loaded_first_and_no_more_passes_than_asked() -> None:
    model = model_of("topk_softmax", num_experts=8)
    pair = batch(1, sequences=4)
    load = torch.tensor([[5, 1, 9, 3, 2, 8, 7, 6], [8, 7, 6, 5, 4, 3, 2, 1]])
    found = prune(model, [pair], load, top_k=2, passes=21)
    assert found.num_tokens == pair[1].numel()
    assert [number for number, _ in found.curve] == [0, 1, 2, 4, 6]
    assert found.loss == found.curve[0][1]
    gone = torch.zeros(L, 8, dtype=torch.bool)
    gone[0, [1, 4]], gone[1, [7, 6]] = True, True
    assert found.curve[2][1] == loss_without(model, [pair], gone)
    assert found.single is not None
    one = torch.zeros(L, 8, dtype=torch.bool)
    one[1, 3] = True
    assert found.single[1, 3].item() == loss_without(model, [pair], one) - found.loss
    fewer = prune(model, [pair], load, top_k=2, passes=20)
    assert (fewer.single, len(fewer.curve)) == (None, 5)
    assert prune(model, [pair], load, top_k=2, passes=1).curve == [(0, found.loss)]
    assert prune(model, [pair], load, top_k=8, passes=99).curve == [(0, found.loss)]


def test_drift_of_choices() -> None:
    before = torch.tensor([[[0, 1], [2, 3], [-1, -1]], [[0, 1], [0, 1], [0, 1]]], dtype=torch.int16)
    after = torch.tensor([[[1, 0], [2, 1], [-1, -1]], [[2, 3], [1, 2], [0, 1]]], dtype=torch.int16)
    assert agreement(before, after) == pytest.approx([3 / 4, 3 / 6])
    assert changed_sets(before, after) == pytest.approx([1 / 3, 2 / 3])
    assert agreement(after, after) == [1, 1]
    assert all(math.isnan(value) for value in agreement(before[:, :2], after))
