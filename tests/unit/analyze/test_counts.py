"""What a pass counts, against plain loops over tokens."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from tests.tiny import tiny_model
from titan_moe.analyze.counts import (
    ENTROPY_BINS,
    MARGIN_EDGES,
    Counts,
    bucket_starts,
    choices_of,
    count_batch,
    count_tokens,
    margins,
    zero_counts,
)
from titan_moe.analyze.tokens import CLASSES, classes_of, read_vocabulary
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.model.routing import Routing, make_routing

B, S, E, L, EOT, PIECE = 3, 16, 4, 2, 10, 4


def a_pass(router: str) -> tuple[Counts, list[tuple[torch.Tensor, tuple[Routing, ...]]], list]:
    """Two batches, one of each of two texts, with ends of documents in them."""
    model = tiny_model(router)
    model.init_weights(0)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.3, 0.3, E))
    vocabulary = read_vocabulary(bytes_tokenizer(), torch.device("cpu"))
    biases = [layer.expert_bias for layer in model.moe_layers()]
    counts = zero_counts(texts=2, vocabulary=257, layers=L, experts=E, seq_len=S, device=torch.device("cpu"))
    batches = []
    for text in range(2):
        tokens = torch.randint(32, 64, (B, S))
        tokens[torch.rand(B, S) < 0.15] = EOT
        with torch.no_grad():
            _, routings = model(tokens, want="routings")
        classes = classes_of(tokens, vocabulary)
        count_batch(counts, text, tokens, routings, biases, classes=classes, eot_id=EOT, piece_tokens=PIECE)
        batches.append((tokens, routings))
    return counts, batches, biases


def chosen(routing: Routing, t: int) -> list[int]:
    return [e for e in routing.topk_experts[t].tolist() if e < E]


ROUTERS = ["topk_softmax", "sigmoid", "expert_choice"]


@pytest.mark.parametrize("router", ROUTERS)
def test_loads_by_groups_and_pairs_are_those_of_a_loop(router: str) -> None:
    counts, batches, _ = a_pass(router)
    expected: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(L, 300, E, dtype=torch.int64))
    pairs, following = torch.zeros(L, E, E, dtype=torch.int64), torch.zeros(L - 1, E, E, dtype=torch.int64)
    vocabulary = read_vocabulary(bytes_tokenizer(), torch.device("cpu"))
    for text, (tokens, routings) in enumerate(batches):
        classes = classes_of(tokens, vocabulary).flatten().tolist()
        for t, token in enumerate(tokens.flatten().tolist()):
            bucket = 0 if t % S == 0 else int(math.log2(t % S)) + 1
            of_layers = [chosen(routing, t) for routing in routings]
            for layer, experts in enumerate(of_layers):
                for name, group in (("text", text), ("token", token), ("class", classes[t]), ("position", bucket)):
                    for e in experts:
                        expected[name][layer, group, e] += 1
                for i in experts:
                    for j in experts:
                        pairs[layer, i, j] += 1
                    for j in of_layers[layer + 1] if layer + 1 < L else []:
                        following[layer, i, j] += 1
    for name in ("text", "token", "class", "position"):
        found = getattr(counts, f"load_by_{name}")[..., :-1]
        assert found.dtype == torch.int64
        assert torch.equal(found, expected[name][:, : found.shape[1]]), name
        assert not expected[name][:, found.shape[1] :].any()
    assert torch.equal(counts.coactivation, pairs)
    assert torch.equal(counts.transitions, following)
    assert counts.num_tokens.tolist() == [B * S, B * S]
    assert counts.tokens_by_position.tolist() == [2 * B * n for n in (1, 1, 2, 4, 8)]
    if router != "expert_choice":
        assert torch.equal(
            pairs.diagonal(dim1=1, dim2=2), sum(torch.stack([r.tokens_per_expert for r in rs]) for _, rs in batches)
        )


@pytest.mark.parametrize("router", ROUTERS)
def test_margins_and_entropies_are_those_of_a_loop(router: str) -> None:
    counts, batches, biases = a_pass(router)
    for layer in range(L):
        values, entropies = [], []
        for _, routings in batches:
            routing = routings[layer]
            bias = torch.zeros(E) if biases[layer] is None else biases[layer]
            compared = (routing.selection + bias).tolist()
            for t, row in enumerate(compared):
                inside = [row[e] for e in chosen(routing, t)]
                outside = [row[e] for e in range(E) if e not in chosen(routing, t)]
                if inside and outside:
                    values.append(min(inside) - max(outside))
                entropies.append(-sum(p * math.log(p) for p in routing.scores[t].double().tolist()))
        edges = [-math.inf, *MARGIN_EDGES, math.inf]
        histogram = [sum(low <= v < high for v in values) for low, high in itertools.pairwise(edges)]
        assert counts.margin_counts[layer].tolist() == histogram
        assert counts.margin_sum[layer].item() == pytest.approx(sum(values), rel=1e-5)
        assert counts.margin_negative[layer].item() == sum(v < 0 for v in values)
        assert counts.entropy_sum[layer].item() == pytest.approx(sum(entropies), rel=1e-5)
        histogram = [0] * ENTROPY_BINS
        for entropy in entropies:
            histogram[min(ENTROPY_BINS - 1, int(entropy / math.log(E) * ENTROPY_BINS))] += 1
        assert counts.entropy_counts[layer].tolist() == histogram
    if router != "expert_choice":  # token choice takes the best
        assert not counts.margin_negative.any()


def test_pieces_of_documents_are_those_of_a_loop() -> None:
    counts, batches, _ = a_pass("topk_softmax")
    pieces: list[list[tuple[int, int]]] = []  # (batch, token) of each
    by_text = []
    for number, (tokens, _) in enumerate(batches):
        before = len(pieces)
        for b, row in enumerate(tokens.tolist()):
            is_new = True
            for s, token in enumerate(row):
                if is_new:
                    pieces.append([])
                pieces[-1].append((number, b * S + s))
                is_new = token == EOT
        by_text.append(len(pieces) - before)
    assert counts.pieces.tolist() == by_text
    long = [piece for piece in pieces if len(piece) >= PIECE]
    assert 0 < len(long) < len(pieces)
    assert counts.long_pieces.item() == len(long)
    assert counts.piece_inverse.item() == pytest.approx(sum(1 / len(piece) for piece in long))
    for layer in range(L):
        sums = dict.fromkeys(["maxvio", "maxvio2", "entropy", "entropy2", "nats"], 0.0)
        shares, squares = [0.0] * E, [0.0] * E
        for piece in long:
            load = [0] * E
            for number, t in piece:
                for e in chosen(batches[number][1][layer], t):
                    load[e] += 1
            p = [n / sum(load) for n in load]
            nats = -sum(x * math.log(x) for x in p if x)
            violation, even = max(load) / (sum(load) / E) - 1, nats / math.log(E)
            values = {"maxvio": violation, "maxvio2": violation**2, "entropy": even, "entropy2": even**2, "nats": nats}
            sums = {name: sums[name] + value for name, value in values.items()}
            shares = [a + b for a, b in zip(shares, p, strict=True)]
            squares = [a + b * b for a, b in zip(squares, p, strict=True)]
        assert counts.piece_maxvio[:, layer].tolist() == pytest.approx([sums["maxvio"], sums["maxvio2"]])
        assert counts.piece_entropy[:, layer].tolist() == pytest.approx([sums["entropy"], sums["entropy2"]])
        assert counts.piece_nats[layer].item() == pytest.approx(sums["nats"])
        assert counts.piece_share[0, layer].tolist() == pytest.approx(shares)
        assert counts.piece_share[1, layer].tolist() == pytest.approx(squares)


def test_a_margin_is_infinite_without_a_choice() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    routing = Routing(logits, logits.softmax(-1), torch.ones(1, 2), torch.tensor([[1, 3]]), torch.tensor([0, 1, 0]))
    scores = logits.softmax(-1)[0]
    assert margins(routing, None).item() == pytest.approx((scores[1] - scores[2]).item())  # of scores: no selection
    assert margins(routing._replace(selection=logits), torch.tensor([0.0, -1.5, 0.0])).item() == pytest.approx(-0.5)
    for experts in ([[3, 3]], [[0, 1, 2]]):
        assert margins(routing._replace(topk_experts=torch.tensor(experts)), None).item() == math.inf


def test_slots_and_tokens_without_an_expert_are_counted() -> None:
    """By a loop over the choices; slots that a router does not leave so itself are not unused."""
    vocabulary = read_vocabulary(bytes_tokenizer(), torch.device("cpu"))
    sizes = {"texts": 1, "vocabulary": vocabulary.kind.numel(), "layers": 2, "experts": 3, "seq_len": 4}
    counts = zero_counts(**sizes, device=torch.device("cpu"))
    scores, ids = torch.full((4, 3), 1 / 3), torch.tensor([[0, 3], [3, 3], [2, 1], [1, 3]])
    used = make_routing(scores, scores, torch.ones(4, 2), ids, used_TK=ids < 3)
    chosen_by_experts = Routing(scores, scores, torch.ones(4, 2), ids, torch.tensor([1, 2, 1]))
    tokens = torch.tensor([[65, 66, 67, 68]])
    arguments = {"classes": classes_of(tokens, vocabulary), "eot_id": EOT, "piece_tokens": PIECE}
    for _ in range(2):
        count_batch(counts, 0, tokens, [used, chosen_by_experts], [None, None], **arguments)
    slots = [one for row in ids.tolist() for one in row]
    assert counts.unused.tolist() == [2 * slots.count(3), 0]
    assert counts.unrouted.tolist() == [2, 2]


def test_layers_may_have_different_numbers_of_choices() -> None:
    one = Routing(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 1), torch.tensor([[2]]), torch.tensor([0, 0, 1]))
    two = one._replace(topk_experts=torch.tensor([[0, 1]]))
    assert choices_of([one, two]).tolist() == [[[2, 3]], [[0, 1]]]


def test_buckets_double() -> None:
    assert bucket_starts(1) == [0]
    assert bucket_starts(16) == [0, 1, 2, 4, 8]
    assert bucket_starts(17) == [0, 1, 2, 4, 8, 16]


def test_tokens_are_counted_by_class() -> None:
    vocabulary = read_vocabulary(bytes_tokenizer(), torch.device("cpu"))
    real = torch.tensor([[*b"ab 1", 256]])
    dummy = (torch.tensor([[*b"zzzzz"]]), torch.full((1, 5), -100))
    counts = count_tokens([lambda: [(real, real)], lambda: [(real, real), dummy]], vocabulary)
    expected = {("word_start", ord("a")): 2, ("word_continuation", ord("b")): 2, ("whitespace", ord(" ")): 2}
    expected |= {("digit", ord("1")): 2, ("special", 256): 2}
    names = list(CLASSES)
    assert {(names[c], v): int(counts[c, v]) for c, v in counts.nonzero().tolist()} == expected
