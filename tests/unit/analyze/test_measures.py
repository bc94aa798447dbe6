"""Numbers from counts, against their formulas written out and against drawing at random."""

import math
import random

import pytest
import torch

from titan_moe.analyze import measures


def counts_of(seed: int = 0, vocabulary: int = 12, experts: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each id went to each expert, and how often it occurs; one expert has nothing."""
    generator = torch.Generator().manual_seed(seed)
    counts_V = torch.randint(0, 30, (vocabulary,), generator=generator)
    load_VE = (counts_V.unsqueeze(1) * torch.rand(vocabulary, experts, generator=generator)).long()
    load_VE[:, -1] = 0
    return load_VE, counts_V


def test_specialisation_is_the_kl_divergence() -> None:
    load_VE, counts_V = counts_of()
    found = measures.kl_to_mean(load_VE, counts_V).tolist()
    N = int(counts_V.sum())
    for e in range(2):
        n = int(load_VE[:, e].sum())
        pairs = [(int(k), int(c)) for k, c in zip(load_VE[:, e], counts_V, strict=True) if k]
        assert found[e] == pytest.approx(sum(k / n * math.log(k / n * N / c) for k, c in pairs))
    assert math.isnan(found[2])


def test_the_bias_of_specialisation_is_what_random_experts_show() -> None:
    """Against 4000 draws without replacement, for small and large loads and frequent and single ids."""
    counts_V = torch.tensor([1] * 20 + [2] * 10 + [5] * 4 + [40, 300, 0])
    pool = [v for v, c in enumerate(counts_V.tolist()) for _ in range(c)]
    loads = [1, 7, 60, 250, len(pool)]
    found = measures.kl_at_random(counts_V, torch.tensor([*loads, 0]))
    draw = random.Random(0)
    for n, value in zip(loads, found.tolist(), strict=False):
        draws = []
        for _ in range(4000 if n < len(pool) else 1):
            load_V = torch.bincount(torch.tensor(draw.sample(pool, n)), minlength=len(counts_V))
            draws.append(measures.kl_to_mean(load_V.unsqueeze(1), counts_V).item())
        error = torch.tensor(draws).std(correction=0).item() / math.sqrt(len(draws))
        assert value == pytest.approx(sum(draws) / len(draws), abs=4 * error + 1e-9), n
    assert math.isnan(found[-1])


def test_the_series_continues_the_sum() -> None:
    """At means around the one where it takes over, both against SciPy's distribution."""
    hypergeom = pytest.importorskip("scipy.stats").hypergeom
    N = 20000
    for c, n in ((500, 2500), (500, 2700), (3000, 500), (19000, 60), (19000, 80), (3, 19990)):
        k = torch.arange(0, min(c, n) + 1, dtype=torch.float64)
        p = torch.tensor(hypergeom.pmf(k.numpy(), N, c, n))
        exact = (p * torch.special.xlogy(k, k)).sum().item()
        found = measures.mean_k_log_k(*(torch.tensor(float(x), dtype=torch.float64) for x in (c, n, N))).item()
        assert found == pytest.approx(exact, rel=1e-6), (c, n)


def test_lift_and_mutual_information() -> None:
    joint = torch.tensor([[8, 2], [1, 9]])
    load_i, load_j = joint.sum(1), joint.sum(0)
    found = measures.lift(joint, load_i, load_j, 20)
    assert found.tolist() == [[8 * 20 / (10 * 9), 2 * 20 / (10 * 11)], [1 * 20 / (10 * 9), 9 * 20 / (10 * 11)]]
    p = [[0.4, 0.1], [0.05, 0.45]]
    expected = sum(p[i][j] * math.log(p[i][j] / (0.5 * [0.45, 0.55][j])) for i in range(2) for j in range(2))
    assert measures.mutual_information(joint) == pytest.approx(expected)
    assert math.isnan(measures.lift(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1), 5).item())


def test_overlap_of_tokens() -> None:
    load_VE = torch.tensor([[4, 2, 0], [0, 2, 0]])
    found = measures.token_overlap(load_VE)
    assert found[:2, :2].flatten().tolist() == pytest.approx([1, math.sqrt(0.5), math.sqrt(0.5), 1])
    assert found[2].isnan().all()


def test_top_tokens_are_those_of_the_largest_part_of_the_divergence() -> None:
    load_VE, counts_V = counts_of(vocabulary=40)
    N = int(counts_V.sum())
    found = measures.top_tokens(load_VE, counts_V, number=5, min_count=4)
    for e in range(3):
        n, scores = int(load_VE[:, e].sum()), {}
        for v, (k, c) in enumerate(zip(load_VE[:, e].tolist(), counts_V.tolist(), strict=True)):
            if k >= 4 and k / n > c / N:
                scores[v] = k * math.log(k / n * N / c)
        assert found[e] == sorted(scores, key=lambda v: -scores[v])[:5]
    assert found[0]
    assert found[2] == []


def test_median_mean_and_pairs() -> None:
    edges = [1.0, 2.0, 4.0]
    assert measures.median_of_bins(torch.tensor([0, 2, 2, 0]), edges) == 2.0
    assert measures.median_of_bins(torch.tensor([0, 1, 4, 0]), edges) == pytest.approx(2 + 2 * 1.5 / 4)
    assert measures.median_of_bins(torch.tensor([5, 1, 0, 0]), edges) == 1.0
    assert measures.median_of_bins(torch.tensor([1, 0, 0, 9]), edges) == 4.0
    assert math.isnan(measures.median_of_bins(torch.zeros(4), edges))
    mean, std = measures.mean_and_std(torch.tensor([6.0, 14.0], dtype=torch.float64), 3)
    assert (mean.item(), std.item()) == pytest.approx((2, math.sqrt(2 / 3)))
    assert math.isnan(measures.mean_and_std(torch.zeros(2), 0)[0].item())
    assert measures.mean_of_pairs(torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 6.0], [2.0, 6.0, 9.0]])) == 3
    assert math.isnan(measures.mean_of_pairs(torch.ones(1, 1)))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_divergence_of_documents_is_0_for_random_ones(top_k: int) -> None:
    """Beside its first-order bias, where tokens draw their experts from one distribution; else far above it."""
    E, n, pieces = 6, 200, 400
    weights = torch.tensor([6.0, 5, 4, 3, 2, 0])
    load_PE = torch.zeros(pieces, E, dtype=torch.int64)
    for piece in range(pieces):
        picks = torch.multinomial(weights.expand(n, E), top_k)
        load_PE[piece] = torch.bincount(picks.flatten(), minlength=E)

    def kl(load_PE: torch.Tensor) -> float:
        p = load_PE / load_PE.sum(1, keepdim=True).double()
        nats = torch.special.entr(p).sum().item()
        return measures.document_kl(nats, p.sum(0), load_PE.sum(0), pieces / n, pieces, pieces * n)

    bias = (5 - top_k) / (2 * n * top_k)
    assert abs(kl(load_PE)) < 0.1 * bias
    load_PE[::2] = load_PE[::2].flip(1)
    assert kl(load_PE) > 10 * bias
    assert math.isnan(measures.document_kl(0.0, torch.zeros(E), torch.ones(E), 0.0, 0, 1))
