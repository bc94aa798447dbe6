"""How even the load gets by quantile balancing: our rule, torchtitan's, and both with exact quantiles instead of bins.

    python -m benchmarks.bench_quantile

Each line is one case: E experts of which K are chosen, T tokens of sigmoid scores of normal logits, whose means differ
between experts. MaxVio, mean over draws, after 1 and 10 updates of the bias: on the same tokens, as in a step whose
batch is repeated, and on new ones, which chance keeps from being even.

Sources: torchtitan's pull request 4577, models/common/moe.py at 00a4c14, after Kimi K3's report, 2.3.3 and appendix D;
ours is `loss_free` with rule `quantile`.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from titan_moe.balancer import loss_free
from titan_moe.metrics import maxvio
from titan_moe.model.routing import ROUTERS

Rule = Callable[[Tensor, Tensor, int], Tensor]  # logits (T, E), bias (E,), top_k -> the next bias (E,)
CASES = [  # experts, top_k, tokens, standard deviation of logits, of their means
    (64, 8, 8192, 0.1, 0.1),
    (64, 8, 8192, 1.0, 1.0),
    (64, 8, 8192, 3.0, 2.0),
    (128, 8, 16384, 1.0, 1.0),
    (32, 2, 8192, 1.0, 1.0),
]


def ours(logits: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """What a step of titan_moe does."""
    balancer = loss_free(rule="quantile")
    assert balancer.observe is not None
    routing = ROUTERS["sigmoid"](top_k=top_k)(logits, bias)
    moved = balancer.post_step(balancer.observe(routing, bias), bias)
    assert isinstance(moved, Tensor)
    return moved


def torchtitan(logits: Tensor, bias: Tensor, top_k: int, bins: int = 1000) -> Tensor:
    """A step of pull request 4577: the K/E quantile of c_t - s_te from a uniform histogram, centred."""
    required = required_bias(logits, bias, top_k, chosen=0)
    num_experts = len(bias)

    # Bins over the bias's range and 1 beyond it on both sides: the widest that a bias of scores in [0, 1] can need.
    lowest, width = bias.min() - 1, (bias.max() - bias.min() + 2) / bins
    index = ((required - lowest) / width).floor().long().clamp(0, bins - 1).t()  # (E, T)
    counts = torch.zeros(num_experts, bins, dtype=torch.int64).scatter_add_(1, index, torch.ones_like(index))

    # Within the bin of the quantile tokens are taken to be spread evenly.
    target = len(logits) * top_k / num_experts
    cumulative = counts.cumsum(1)
    bin_E1 = (cumulative < math.ceil(target)).sum(1, keepdim=True)
    inside = counts.gather(1, bin_E1)
    quantile = (bin_E1 + (target - cumulative.gather(1, bin_E1) + inside) / inside).squeeze(1)
    return (quantile - quantile.mean()) * width


def required_bias(logits: Tensor, bias: Tensor, top_k: int, *, chosen: int) -> Tensor:
    """c_t - s_te, (T, E): the bias at which expert e is at the cutoff of token t.

    The cutoff is the mean of the smallest `chosen` of a token's K biased scores and its (K+1)-th.
    """
    scores = logits.sigmoid()
    top = (scores + bias).topk(top_k + 1, dim=-1).values  # (T, K + 1)
    return top[:, top_k - chosen :].mean(-1, keepdim=True) - scores


def exact(chosen: int) -> Rule:
    """The K/E quantile itself, by sorting, at our cutoff (`chosen` 1) or at torchtitan's (0)."""

    def rule(logits: Tensor, bias: Tensor, top_k: int) -> Tensor:
        required = required_bias(logits, bias, top_k, chosen=chosen)
        return required.sort(0).values[math.ceil(len(logits) * top_k / len(bias)) - 1]

    return rule


RULES: dict[str, Rule] = {
    "titan_moe": ours,
    "torchtitan": torchtitan,
    "midway, exact": exact(1),
    "(K+1)-th, exact": exact(0),
}


def evenness(rule: Rule, case: tuple[int, int, int, float, float], seed: int, *, repeat: bool) -> tuple[float, float]:
    """MaxVio of the tokens that follow 1 and 10 updates; with `repeat` these are always the same tokens."""
    num_experts, top_k, num_tokens, spread, skew = case
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_experts, generator=generator) * skew

    def draw() -> Tensor:
        return torch.randn(num_tokens, num_experts, generator=generator) * spread + means

    bias, logits, found = torch.zeros(num_experts), draw(), []
    route = ROUTERS["sigmoid"](top_k=top_k)
    for _ in range(10):
        bias = rule(logits, bias, top_k)
        logits = logits if repeat else draw()
        found.append(float(maxvio(route(logits, bias).tokens_per_expert.unsqueeze(0))))
    return found[0], found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    draws = range(parser.parse_args().draws)
    print("rule             E    K  T      logits  means  same: 1   same: 10  new: 1    new: 10")
    for case in CASES:
        for name, rule in RULES.items():
            same, new = (torch.tensor([evenness(rule, case, seed, repeat=r) for seed in draws]) for r in (True, False))
            numbers = [*same.mean(0).tolist(), *new.mean(0).tolist()]
            sizes = "{:<4} {:<2} {:<6} {:<7} {:<6}".format(*case)
            print(f"{name:<16} {sizes} " + " ".join(f"{number:<9.4f}" for number in numbers))


if __name__ == "__main__":
    main()
