"""What torchtitan's main computes for balance since its release 0.3.0, and what ours are beside it.

Its pull request 3864 (head of 2026-08-21), the sequence-wise loss, and what main made of it at 0276e6e; and its pull
request 4577 at 00a4c14, quantile balancing, which stands in benchmarks/bench_quantile.py.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_quantile import CASES, evenness, exact, ours, torchtitan
from titan_moe.balancer import aux_loss
from titan_moe.model.routing import ROUTERS
from titan_moe.step import sequence_load

B, S, E, K = 3, 16, 8, 2


def loss_of_3864(probabilities_BSE: Tensor, topk_experts_BSK: Tensor) -> Tensor:
    """(1 / B) sum_b sum_e f_be p_be, f = counts E / (K T_b), p the mean of the normalised scores; float64."""
    total = probabilities_BSE.new_zeros(())
    for p_SE, chosen_SK in zip(probabilities_BSE, topk_experts_BSK, strict=True):
        counts_E = torch.bincount(chosen_SK.flatten(), minlength=E)
        tokens = counts_E.sum() / K
        total = total + (counts_E * E / (K * tokens) * p_SE.sum(0) / tokens).sum()
    return total / len(probabilities_BSE)


def loss_of_main(probabilities_TE: Tensor, topk_experts_TK: Tensor) -> Tensor:
    """sum_e f_e P_e over the step's tokens, f = E counts / sum counts, P the sum of the scores of one forward pass."""
    counts_E = torch.bincount(topk_experts_TK.flatten(), minlength=E)
    return (E * counts_E / counts_E.sum() * probabilities_TE.sum(0)).sum() / len(probabilities_TE)


@pytest.mark.parametrize("name", ["sigmoid", "softmax_topk"])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_their_auxiliary_losses_are_ours_times_experts_over_choices(name: str, scope: str) -> None:
    """Value and gradient of the logits, in float64; the bias moves choices alone."""
    logits = torch.randn(B * S, E, dtype=torch.float64, requires_grad=True)
    routing = ROUTERS[name](top_k=K)(logits, torch.linspace(-0.2, 0.2, E))
    load = sequence_load(routing, B) if scope == "sequence" else routing.tokens_per_expert
    found = aux_loss(coeff=E / K, scope=scope).loss(routing, load, B * S)

    scores = logits.sigmoid() if name == "sigmoid" else logits.softmax(-1)
    probabilities = scores / scores.sum(-1, keepdim=True)
    if scope == "sequence":
        expected = loss_of_3864(probabilities.view(B, S, E), routing.topk_experts.view(B, S, K))
    else:
        expected = loss_of_main(probabilities, routing.topk_experts)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, check_dtype=False)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)
    assert gradients[0].abs().max() > 1e-4


def test_both_quantiles_are_the_exact_ones_within_a_bin() -> None:
    """At the cutoffs that each takes; theirs is centred, and a bin of theirs as wide as the bias's range asks for."""
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(4096, 16, generator=generator), torch.randn(16, generator=generator) / 10
    logits = logits + torch.linspace(-1, 1, 16)
    midway, next_one = (exact(chosen)(logits, bias, 2) for chosen in (1, 0))
    torch.testing.assert_close(ours(logits, bias, 2) - bias, midway - bias, rtol=0.06, atol=1e-4)
    width = float(bias.max() - bias.min() + 2) / 1000
    found, expected = torchtitan(logits, bias, 2), next_one - next_one.mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * width)
    assert (found - (midway - midway.mean())).abs().max() > 2 * width


def test_ours_is_more_even_after_ten_steps() -> None:
    """On the same tokens; after one step on both sides chance decides."""
    num_experts, top_k, _, spread, skew = CASES[1]
    case = (num_experts, top_k, 4096, spread, skew)
    (first, last), (their_first, their_last) = (evenness(rule, case, 0, repeat=True) for rule in (ours, torchtitan))
    assert last < 0.01 < their_last
    assert max(first, their_first) < 0.3
