"""Numbers from counts: pure functions of what a pass has counted.

Shapes: V vocabulary, L MoE layers, E experts.
"""

import math

import torch
from torch import Tensor

SMALL_MEAN = 64.0  # up to which an expectation is summed term by term
TERMS = 192  # so many terms: more than 15 standard deviations above SMALL_MEAN
ROWS = 64  # counts of ids that are summed at a time


def kl_to_mean(load_VE: Tensor, counts_V: Tensor) -> Tensor:
    """Specialisation: KL divergence of each expert's distribution over ids to that of all tokens, nats, (E,).

    sum_v p(v|e) ln(p(v|e) / p(v)) with the shares as counted (plug-in); NaN for an expert without tokens.
    """
    p_VE = load_VE / load_VE.sum(0).double()
    q_V = counts_V / counts_V.sum().double()
    return torch.special.xlogy(p_VE, p_VE).sum(0) - torch.special.xlogy(p_VE, q_V.unsqueeze(1)).sum(0)


def kl_at_random(counts_V: Tensor, load_E: Tensor) -> Tensor:
    """What `kl_to_mean` would give on average for experts that took as many tokens at random: its bias, nats, (E,).

    An expert takes each token at most once, so it draws n of N tokens without replacement: of an id that occurs c times
    it gets k, hypergeometric, and E[KL] = sum_v E[k ln k] / n - ln n - sum_v (c / N) ln(c / N). NaN for n = 0.
    """
    # The expectation depends on the id by its count alone: ids with equal counts are computed once.
    counts, times = counts_V[counts_V > 0].unique(return_counts=True)
    N, n_E = counts_V.sum().double(), load_E.double()
    total_E = torch.zeros_like(n_E)
    for part, weight in zip(counts.split(ROWS), times.split(ROWS), strict=True):
        total_E += weight.double() @ mean_k_log_k(part.double().unsqueeze(1), n_E, N)
    entropy = -torch.special.xlogy(counts / N, counts / N) @ times.double()
    return torch.where(load_E > 0, total_E / n_E - n_E.log() + entropy, math.nan)


def mean_k_log_k(c: Tensor, n: Tensor, N: Tensor) -> Tensor:
    """E[k ln k] where k of c marked ones are among n drawn of N, without replacement; shapes broadcast.

    Summed over the distribution where the mean c n / N is small, else the series of k ln k at the mean up to the fourth
    moment, whose error is below 1e-6 of the mean there.
    """
    mean = c * n / N

    # The moments of the hypergeometric distribution; that of fourth order as a normal one has it.
    variance = mean * (1 - c / N) * (N - n) / (N - 1).clamp(min=1)
    third = variance * (N - 2 * c) * (N - 2 * n) / (N * (N - 2).clamp(min=1))
    series = mean * mean.log() + variance / (2 * mean) - third / (6 * mean**2) + variance**2 / (4 * mean**3)
    series = torch.where(mean > 0, series, 0.0)

    # ln C(c, k) + ln C(N - c, n - k) - ln C(N, n), from k = 2 on, as 0 ln 0 and 1 ln 1 are 0.
    largest = min(TERMS, int(torch.where(mean < SMALL_MEAN, torch.minimum(c, n), 0).max()))
    if largest < 2:
        return torch.where(mean < SMALL_MEAN, 0.0, series)
    k = torch.arange(2, largest + 1, dtype=torch.float64, device=c.device)
    c, n = c.unsqueeze(-1), n.unsqueeze(-1)
    log_p = _log_choose(c, k) + _log_choose(N - c, n - k) - _log_choose(N, n)
    possible = (k <= c) & (k <= n) & (n - k <= N - c)
    summed = (torch.where(possible, log_p, -math.inf).exp() * k * k.log()).sum(-1)
    return torch.where(mean < SMALL_MEAN, summed, series)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    k = torch.minimum(k.clamp(min=0), n)  # impossible ones are masked by the caller
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def lift(joint: Tensor, load_i: Tensor, load_j: Tensor, num_tokens: int) -> Tensor:
    """How many times as often two experts get the same token as independent ones would: (..., E, E), NaN for 0 / 0."""
    return joint.double() * num_tokens / (load_i.unsqueeze(-1).double() * load_j.unsqueeze(-2).double())


def mutual_information(joint_EE: Tensor) -> float:
    """Mutual information of the two experts of a pair that is drawn from these counts, nats (plug-in)."""
    p = joint_EE.double() / joint_EE.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, independent)).sum().item()


def token_overlap(load_VE: Tensor) -> Tensor:
    """How alike the ids are that two experts get: sum_v sqrt(p(v|i) p(v|j)), the Bhattacharyya coefficient, (E, E).

    1 for equal distributions, 0 for experts that share no id, NaN for one without tokens.
    """
    root_VE = (load_VE / load_VE.sum(0).double()).sqrt()
    return root_VE.t() @ root_VE


def mean_of_pairs(matrix_EE: Tensor) -> float:
    """The mean over the pairs i < j that have a number; NaN where none has."""
    i, j = torch.triu_indices(*matrix_EE.shape, offset=1, device=matrix_EE.device)
    return matrix_EE[i, j].double().nanmean().item()


def top_tokens(load_VE: Tensor, counts_V: Tensor, *, number: int, min_count: int) -> list[list[int]]:
    """The ids that say most of each expert, best first: by count * ln lift, their part of its KL divergence.

    Lift is the id's share of the expert's tokens over its share of all. Only ids with a lift above 1 that the expert
    got at least `min_count` times.
    """
    lifts = (load_VE / load_VE.sum(0).double()) / (counts_V / counts_V.sum().double()).unsqueeze(1)  # (V, E)
    counts = (load_VE >= min_count) & (lifts > 1)
    best = torch.where(counts, load_VE * lifts.log(), -math.inf).topk(min(number, load_VE.shape[0]), dim=0)
    return [
        [int(v) for v, score in zip(ids, scores, strict=True) if score > -math.inf]
        for ids, scores in zip(best.indices.t().tolist(), best.values.t().tolist(), strict=True)
    ]


def median_of_bins(counts: Tensor, edges: list[float]) -> float:
    """The median by a histogram whose inner edges these are, linear inside of its bin; NaN without a count."""
    cumulative = counts.cumsum(0)
    if not cumulative[-1]:
        return math.nan
    half = cumulative[-1].item() / 2
    place = int((cumulative < half).sum())

    # The outer bins have one edge.
    if place in (0, len(edges)):
        return edges[min(place, len(edges) - 1)]
    before = cumulative[place - 1].item()
    fraction = (half - before) / (cumulative[place].item() - before)
    return edges[place - 1] + fraction * (edges[place] - edges[place - 1])


def mean_and_std(sums: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of all, not all but one) from sums and sums of squares (2, ...); NaN for none."""
    mean = sums[0] / (number or math.nan)
    return mean, (sums[1] / (number or math.nan) - mean.square()).clamp(min=0).sqrt()


def document_kl(
    nats_sum: float, share_sum_E: Tensor, load_E: Tensor, inverse_sum: float, number: int, num_tokens: int
) -> float:
    """Mean KL divergence of the loads of pieces of documents to the whole load, less what chance gives, nats.

    The sums over the pieces are of their loads' entropies, shares and 1 / tokens. A piece of n tokens drawn at random
    has E[KL] = (E' - K) / (2 n K) to first order, with E' experts that have tokens and K choices of a token: the
    variance of the shares over twice the shares (Miller, 1955, for K = 1). NaN without pieces.
    """
    if not number or not load_E.any():
        return math.nan
    q_E = load_E / load_E.sum().double()
    kl_sum = -nats_sum - torch.special.xlogy(share_sum_E, q_E).sum().item()
    num_choices = load_E.sum().item() / num_tokens
    chance = ((load_E > 0).sum().item() - num_choices) / (2 * num_choices)
    return (kl_sum - chance * inverse_sum) / number
