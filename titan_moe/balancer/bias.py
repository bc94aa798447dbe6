"""Balancers without a loss: after each optimizer step they move the bias that the selection of experts adds.

Shapes: T tokens, E experts, K top_k, L layers, M bins.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.balancer.common import Balancer, State, constant, no_loss
from titan_moe.model.routing import Routing


def loss_free(
    rate: float | None = None,
    rule: Literal["sign", "proportional", "quantile"] = "sign",
    recenter: bool = False,
    decay_ratio: float = 0.0,
) -> Balancer:
    """Move each expert's selection bias towards even load, once per optimizer step, without a loss.

    From global loads L of the step, with rules

    - `sign`: b_i += rate * sign(mean L - L_i) (Wang et al. 2024, algorithm 1; DeepSeek-V3). `rate` is 0.001 if unset.
    - `proportional`: b_i += rate * (mean L - L_i) / mean L (Wang et al.'s variant by the error itself, here relative,
      so that the rate does not depend on the batch size). `rate` is 0.001 if unset.
    - `quantile`: b_i += rate * q_i, where q_i is the change of b_i alone that gives expert i its even share of the
      step's tokens, a quantile of their margins (`quantile_shift`; Su, 2026; Kimi K3, section 2.3.3). `rate` is 1 if
      unset; less is an exponential average with decay 1 - rate, as Megatron-core's `quantile_balancing`.

    The bias is in the units of the router's selection: logits for the softmax routers, probabilities for `sigmoid`.
    `recenter` subtracts the mean over experts, which never changes a choice. `decay_ratio` is the last part of the run
    over which the rate falls linearly to 0.
    """
    if rate is None:
        rate = 1.0 if rule == "quantile" else 0.001

    # An expert with less than the mean load is made more attractive.
    def post_step(load: Tensor, expert_bias: Tensor) -> Tensor:
        if rule == "quantile":
            change = quantile_shift(load)
        else:
            missing = missing_load(load)
            change = torch.sign(missing) if rule == "sign" else missing
        expert_bias = expert_bias + rate * change
        return expert_bias - expert_bias.mean(-1, keepdim=True) if recenter else expert_bias

    # 1 until the last part of the run, over which it falls linearly to 0.
    def schedule(progress: float) -> float:
        return min(1.0, (1 - progress) / decay_ratio)

    # Only quantiles need to know by how much each token missed each expert.
    observe = margin_counts if rule == "quantile" else None
    return Balancer(no_loss, post_step, observe=observe, schedule=schedule if decay_ratio else constant)


def smebu(rate: float = 5e-4, kappa: float = 2.0, momentum: float = 0.5) -> Balancer:
    """Move the bias softly and with momentum: b += rate * m, m = momentum * m + (1 - momentum) * (s - mean s).

    s_i = tanh(kappa * (mean L - L_i) / mean L), of global loads L: small errors count by their size, large ones no more
    than their sign. m begins at 0. Source: Arcee's Trinity Large report (2026), arXiv 2602.17004, as a transcript of it
    gives the formula; there rate is lambda, momentum beta, and the defaults are those of the report.
    """

    def init(num_experts: int) -> State:
        return {"momentum": torch.zeros(num_experts)}

    def post_step(load: Tensor, expert_bias: Tensor, state: State) -> tuple[Tensor, State]:
        push = torch.tanh(kappa * missing_load(load))  # (L, E)
        average = torch.lerp(push - push.mean(-1, keepdim=True), state["momentum"], momentum)
        return expert_bias + rate * average, {"momentum": average}

    return Balancer(no_loss, post_step, init=init)


def pid(rate: float = 0.01, integral: float = 0.01, derivative: float = 0.0, real_share: float = 1.0) -> Balancer:
    """Move the bias by a discrete PID controller: b += rate * (e + integral * sum of e + derivative * change of e).

    e_i = 1 - L_i / even share, of global loads L; the sum is over the steps so far, and the change since the step
    before, at first since 0. The proportional part is LongCat-Flash's (arXiv 2509.01322, as descriptions of it give
    it): their mu is rate * real_share / E. They name a PID controller, but publish neither its other two parts nor
    gains: these parts are the textbook's, and the defaults are ours.

    Identity experts, which cost nothing, keep their bias: they take what the E others leave. These are to get
    `real_share` of all choices, K_e / K there, in even parts.
    """

    def init(num_experts: int) -> State:
        return {"sum": torch.zeros(num_experts), "error": torch.zeros(num_experts)}

    def post_step(
        load: Tensor, expert_bias: Tensor, state: State, num_identity_experts: int = 0
    ) -> tuple[Tensor, State]:
        if num_identity_experts == 0 and real_share != 1:
            raise ValueError(
                f"balancer.pid.real_share ({real_share}) must be 1 without identity experts: no other expert takes the "
                "rest of the choices"
            )

        # An error of 0 leaves the bias of identity experts, which are the last ones.
        num_experts = load.shape[-1] - num_identity_experts
        is_real = torch.arange(load.shape[-1], device=load.device) < num_experts
        even_L1 = load.sum(-1, keepdim=True) * (real_share / num_experts)
        error = torch.where(is_real, 1 - load / even_L1.clamp(min=1), 0.0)  # (L, E)
        total = state["sum"] + error
        change = error + integral * total + derivative * (error - state["error"])
        return expert_bias + rate * change, {"sum": total, "error": error}

    return Balancer(no_loss, post_step, init=init)


def missing_load(load: Tensor) -> Tensor:
    """How far each expert's load is below the mean, as a part of the mean: (..., E)."""
    load = load.float()
    mean = load.mean(-1, keepdim=True)
    return (mean - load) / mean.clamp(min=1)  # a mean of 0 has nothing to miss


# Quantiles of selection margins over a whole optimizer step, from integer counts that add up over micro-batches.
#
# With cutoff c_t of token t, midway between its K-th and (K+1)-th largest biased selection scores, the token chooses
# the experts with s_ti + b_i > c_t. So c_t - (s_ti + b_i) is the change of b_i that brings expert i to the cutoff, and
# the K/E quantile of these margins over the step's tokens is the change that puts expert i above the cutoff of its even
# share, T * K / E tokens: one step of alternating descent on the dual of the balanced assignment problem, where any
# cutoff between the two scores is optimal. Sources: Su (2026), "MoE odyssey 6", kexue.fm/archives/11619; Kimi K3
# (2026), section 2.3.3 and appendices C and D, which also counts in bins; Megatron-core's `quantile_balancing`. These
# take the (K+1)-th score itself as the cutoff: then the first expert that a token did not choose has a margin of
# exactly 0, and the balance comes more slowly.
#
# Our bins are uniform in asinh(margin / SCALE): fine around 0, where a balanced router's quantiles are, and wide enough
# for logits, which unlike Kimi's sigmoid scores have no bounds.
BINS = 512
SCALE = 1e-3  # margins below it lie in bins of about SCALE * 2 * REACH / BINS, those above in bins of 5 % of their size
REACH = math.asinh(100 / SCALE)  # margins beyond 100 count as 100


def margin_counts(routing: Routing, expert_bias_E: Tensor) -> Tensor:
    """(E, M + 1) int32: for each expert, how many tokens are in each bin of its margin, and last its load.

    Of a router with `mean_k` the last column is another one whose sum is that of all choices which there are to be.
    """
    if routing.selection is None:
        raise ValueError("balancer.loss_free.rule = 'quantile' needs a router whose Routing has a selection")
    T, E = routing.selection.shape
    biased_TE = routing.selection + expert_bias_E

    # With as many choices as experts there is no (K+1)-th score; the two smallest are taken then. Where a token takes
    # all experts above 0, that is the cutoff, and the share of an expert is of the choices that there are to be.
    load_E = routing.tokens_per_expert
    if routing.mean_k is None:
        cutoff_T1 = biased_TE.topk(min(routing.topk_experts.shape[1] + 1, E)).values[:, -2:].mean(-1, keepdim=True)
    else:
        cutoff_T1 = biased_TE.new_zeros(())
        load_E = F.pad(load_E.new_full((1,), T * routing.mean_k), (0, E - 1))  # their sum counts
    position_TE = (torch.asinh((cutoff_T1 - biased_TE) / SCALE) / REACH + 1) * (BINS / 2)
    bin_TE = position_TE.nan_to_num().long().clamp(0, BINS - 1)

    # One scatter for the histograms of all experts, side by side in one row. Integers add up to the same in any order.
    cell_N = (bin_TE + torch.arange(E, device=bin_TE.device) * BINS).flatten()  # (T, E) -> (T * E,)
    counts_EM = torch.zeros(E * BINS, dtype=torch.int32, device=cell_N.device)
    counts_EM = counts_EM.scatter_add_(0, cell_N, counts_EM.new_ones(()).expand(T * E)).view(E, BINS)
    return torch.cat([counts_EM, load_E.int().unsqueeze(1)], dim=1)


def quantile_shift(counts: Tensor) -> Tensor:
    """The change (..., E) of each expert's bias, from the `margin_counts` (..., E, M + 1) of a step."""
    counts_M, load = counts[..., :-1].long(), counts[..., -1].double()
    target = load.mean(-1, keepdim=True).unsqueeze(-1)  # an even share of the step's choices
    cumulative_M = counts_M.cumsum(-1)  # of integers: CUDA has no deterministic sum of this kind for floats
    bin_1 = (cumulative_M < target).sum(-1, keepdim=True).clamp(max=BINS - 1)

    # Within the bin where the quantile lies tokens are taken to be spread evenly. Then back from bins to margins.
    inside = counts_M.gather(-1, bin_1)
    below = cumulative_M.gather(-1, bin_1) - inside
    position = (bin_1 + (target - below) / inside.clamp(min=1)).squeeze(-1)
    return (torch.sinh((position * (2 / BINS) - 1) * REACH) * SCALE).float()
