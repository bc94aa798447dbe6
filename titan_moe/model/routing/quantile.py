"""Quantiles of selection margins over a whole optimizer step, from integer counts that add up over micro-batches.

With cutoff c_t of token t, midway between its K-th and (K+1)-th largest biased selection scores, the token chooses the
experts with s_ti + b_i > c_t. So c_t - (s_ti + b_i) is the change of b_i that brings expert i to the cutoff, and the
K/E quantile of these margins over the step's tokens is the change that puts expert i above the cutoff of its even
share, T * K / E tokens: one step of alternating descent on the dual of the balanced assignment problem, where any
cutoff between the two scores is optimal. Sources: Su (2026), "MoE odyssey 6", kexue.fm/archives/11619; Kimi K3 (2026),
section 2.3.3 and appendices C and D, which also counts in bins; Megatron-core's `quantile_balancing`. These take the
(K+1)-th score itself as the cutoff: then the first expert that a token did not choose has a margin of exactly 0, and
the balance comes more slowly.

Our bins are uniform in asinh(margin / SCALE): fine around 0, where a balanced router's quantiles are, and wide enough
for logits, which unlike Kimi's sigmoid scores have no bounds.

Shapes: T tokens, E experts, K top_k, M bins.
"""

import math

import torch
from torch import Tensor

from titan_moe.model.routing import Routing

BINS = 512
SCALE = 1e-3  # margins below it lie in bins of about SCALE * 2 * REACH / BINS, those above in bins of 5 % of their size
REACH = math.asinh(100 / SCALE)  # margins beyond 100 count as 100


def margin_counts(routing: Routing, expert_bias_E: Tensor) -> Tensor:
    """(E, M + 1) int32: each expert's tokens by the bin of their margin, and last its tokens per expert."""
    assert routing.selection is not None, "a router that takes a bias says what it selected by"
    T, E = routing.selection.shape
    biased_TE = routing.selection + expert_bias_E
    cutoff_T1 = biased_TE.topk(min(routing.topk_experts.shape[1] + 1, E)).values[:, -2:].mean(-1, keepdim=True)
    position_TE = (torch.asinh((cutoff_T1 - biased_TE) / SCALE) / REACH + 1) * (BINS / 2)
    bin_TE = position_TE.nan_to_num().long().clamp(0, BINS - 1)
    cell_N = (bin_TE + torch.arange(E, device=bin_TE.device) * BINS).flatten()
    counts_EM = torch.zeros(E * BINS, dtype=torch.int32, device=cell_N.device)
    counts_EM = counts_EM.scatter_add_(0, cell_N, counts_EM.new_ones(()).expand(T * E)).view(E, BINS)
    return torch.cat([counts_EM, routing.tokens_per_expert.int().unsqueeze(1)], dim=1)


def quantile_shift(counts: Tensor) -> Tensor:
    """The change of each expert's bias, (..., E), from `margin_counts` (..., E, M + 1) of a step: linear in a bin."""
    counts_M, load = counts[..., :-1].long(), counts[..., -1].double()
    target = load.mean(-1, keepdim=True).unsqueeze(-1)  # an even share of the step's choices
    cumulative_M = counts_M.cumsum(-1)  # of integers: CUDA has no deterministic sum of this kind for floats
    bin_1 = (cumulative_M < target).sum(-1, keepdim=True).clamp(max=BINS - 1)
    inside = counts_M.gather(-1, bin_1)
    below = cumulative_M.gather(-1, bin_1) - inside
    position = (bin_1 + (target - below) / inside.clamp(min=1)).squeeze(-1)
    return (torch.sinh((position * (2 / BINS) - 1) * REACH) * SCALE).float()
