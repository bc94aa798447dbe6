"""Load balancing: a balancer is a few pure functions of a layer's routing and of its load.

Shapes: T tokens, E experts, K top_k, G groups of tokens (the sequences of a micro-batch, or 1), M bins.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.routing import Routing
from titan_moe.model.routing.common import asked_for

State = Mapping[str, Tensor]  # what a balancer keeps, by name
OFFERED = ("state", "step", "progress")  # to a post step, after load and bias
SEEN = ("measure", "routings", "index")  # by a loss, after routing, load and num_tokens
Scope = Literal["micro_batch", "sequence", "global_batch", "global_batch_exact"]


def _constant(progress: float) -> float:
    """Leave the rate as it is."""
    return 1.0


class Balancer(NamedTuple):
    """How a layer's load is kept even: by a loss on its routing, by a bias on its selection, or both.

    `loss(routing, load, num_tokens)` is this micro-batch's share of the step's loss, a scalar: a mean over the
    tokens of the micro-batch times (its tokens / `num_tokens`, the tokens of the whole step), so that the shares of
    micro-batches and ranks add up. `load` is tokens per expert, counted over the tokens that `scope` says: (E,), or
    (B, E) with scope `sequence`; of several scopes, in a tuple, it is a dict. With `train` false the loss is evaluated
    and reported, but not trained on.

    A loss that takes more by name gets it: `routings`, those of all MoE layers, of which `index` is this layer's, and
    `measure`, what `measure(...)` gave in the layer's forward. That is where weights are whole, and where the layer's
    input and the experts' outputs are: `titan_moe.model.moe.Measure` says what it may take. A loss of weights alone is
    the same on all ranks and micro-batches: times `share(routing, num_tokens)` it counts once in a step.

    `post_step(load, expert_bias)` gives the bias after an optimizer step; the load (..., E) is of the whole step and
    all ranks. A balancer that needs to know more than tokens per expert counts it by `observe(routing, expert_bias)`:
    integers, whose sum over micro-batches and ranks `post_step` gets in place of the load. The step multiplies the
    change of the bias by `schedule(progress)`; progress goes from 0 to 1, the end of the run.

    A post step that takes more by name gets it: `step`, the step's number from 1, `progress`, and `state`, tensors of
    its own. `init(num_experts)` makes those of one layer, fp32, alike on all ranks; the post step has them with the
    layers in front, (L, ...), and gives (bias, new state). They are in checkpoints, and a skipped step changes none.

    `project(weights)` gives a layer's router weights, by their names, as they are to be after an optimizer step: a
    projection or a normalisation. They come whole and in fp32; those of a linear router are `weight` (E, D).
    """

    loss: Callable[..., Tensor]
    post_step: Callable[..., Tensor | tuple[Tensor, State]]
    scope: Scope | tuple[Scope, ...] = "micro_batch"
    train: bool = True
    observe: Callable[[Routing, Tensor], Tensor] | None = None
    schedule: Callable[[float], float] = _constant
    init: Callable[[int], State] | None = None
    measure: Callable[..., Any] | None = None
    project: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None

    @property
    def has_loss(self) -> bool:
        """Whether it has a loss; the step skips one that has none."""
        return self.loss is not no_loss

    @property
    def moves_bias(self) -> bool:
        """Whether its post step may change the bias."""
        return self.post_step is not keep_bias

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes of the loads that the loss is given; none where it has no loss."""
        if not self.has_loss:
            return ()
        return self.scope if isinstance(self.scope, tuple) else (self.scope,)

    def loss_of(
        self,
        routings: Sequence[Routing],
        index: int,
        loads: Mapping[Scope, Tensor],
        num_tokens: Tensor | int,
        name: str,
    ) -> Tensor:
        """The loss of layer `index`, of its loads by scope; the balancer's measures stand under its `name`."""
        routing = routings[index]
        values = {"measure": (routing.measures or {}).get(name), "routings": routings, "index": index}
        asked = {key: values[key] for key in asked_for(self.loss, SEEN, 3)}
        load = dict(loads) if isinstance(self.scope, tuple) else loads[self.scope]
        return self.loss(routing, load, num_tokens, **asked)

    def asked(self, state: State, step: int, progress: float) -> dict[str, Any]:
        """What of these its post step takes, by name."""
        offered = dict(zip(OFFERED, (state, step, progress), strict=True))
        return {name: offered[name] for name in asked_for(self.post_step, OFFERED)}

    def after_step(
        self, load: Tensor, expert_bias: Tensor, state: State, *, step: int, progress: float
    ) -> tuple[Tensor, State]:
        """Bias and state after an optimizer step: what the post step gives, and of the bias its schedule's part."""
        result = self.post_step(load, expert_bias, **self.asked(state, step, progress))
        moved, new_state = result if isinstance(result, tuple) else (result, state)
        factor = self.schedule(progress)
        return moved if factor == 1 else torch.lerp(expert_bias, moved, factor), new_state


def keep_bias(load: Tensor, expert_bias: Tensor) -> Tensor:
    """Post step of a balancer that has no bias."""
    return expert_bias


def no_loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Loss of a balancer that has none."""
    return routing.router_logits.new_zeros(())


def share(routing: Routing, num_tokens: Tensor | int) -> Tensor | float:
    """The part of the step's tokens that this routing is of."""
    return routing.scores.shape[0] / num_tokens


def _token_mean(value_T: Callable[[Routing], Tensor], coeff: float, train: bool = True) -> Balancer:
    """Build a balancer from a per-token loss (T,): its share is the sum over tokens divided by `num_tokens`."""

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        return coeff * value_T(routing).sum() / num_tokens

    return Balancer(loss, keep_bias, train=train)


def aux_loss(coeff: float = 0.1, scope: Scope = "micro_batch") -> Balancer:
    """Penalise uneven load: L_B = sum_j m_j l_j, k/E at uniform load (the paper's section 2; Switch, eq. 4).

    l_j is the mean probability of expert j, m_j the fraction of tokens that were routed to j, before any were dropped
    (no gradient). `scope` says of which tokens:

    - `micro_batch`: those that one rank routes in one forward pass. Depends on how the step is cut, by definition.
    - `sequence`: those of each sequence, and L_B is the mean over sequences (DeepSeek-V3, equations 17 to 20).
    - `global_batch`: m_j of all ranks and of the step's micro-batches so far, because the first backward runs before
      the last micro-batch is routed (Megatron-core's `global_aux_loss`, a running average; Qiu et al., 2025). Without
      accumulation it is the m_j of the whole step. Costs a collective for each micro-batch.
    - `global_batch_exact`: m_j of the whole step, counted by an extra forward pass over all micro-batches before the
      first backward. Does not depend on how the step is cut.

    Megatron-core and DeepSeek-V3 multiply by E / k: 1 at uniform load.
    """

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        # m of each group of tokens. The load may be of more tokens than this micro-batch, so it is divided by its own
        # sum; times K, because a token is counted once for each of its choices.
        T, E = routing.scores.shape
        load_GE = load.view(-1, E).to(routing.scores.dtype)
        choices_per_token = routing.mean_k or routing.tokens_per_expert.sum() / T  # K
        m_GE = choices_per_token * load_GE / load_GE.sum(-1, keepdim=True).clamp(min=1)  # no expert may be chosen

        # The mean probability l times this micro-batch's share T / num_tokens: the T cancels, a sum is left.
        scores_GE = routing.scores.view(load_GE.shape[0], -1, E).sum(1)  # (T, E) -> (G, E)
        return coeff * (m_GE * scores_GE).sum() / num_tokens

    return Balancer(loss, keep_bias, scope=scope)


def token_z_loss(routing: Routing) -> Tensor:
    """Squared log-partition of each token's router logits, (T,) (ST-MoE, eq. 5)."""
    return routing.router_logits.logsumexp(-1).square()


def token_entropy(routing: Routing) -> Tensor:
    """Entropy of each token's routing probabilities, (T,), nats: small when routing is peaked (the paper, 3.3.1)."""
    return torch.special.entr(routing.scores).sum(-1)


def z_loss(coeff: float = 0.001) -> Balancer:
    """Keep router logits small: L_Z = mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5)."""
    return _token_mean(token_z_loss, coeff)


def entropy_loss(coeff: float = 0.01, form: Literal["token", "batch"] = "token", train: bool = True) -> Balancer:
    """Regularise the entropy of the routing probabilities, nats.

    Form `token`: mean over tokens of H(p_t), small when routing is peaked (the paper, 3.3.1). Form `batch`: minus the
    entropy of the micro-batch's mean probability, -H(mean_t p_t), -log E when experts are used evenly on average (the
    sign and default form of the paper's code); by definition it depends on the micro-batch. With `train` false the
    value is reported but not trained on, as in the paper's runs.
    """
    if form == "token":
        return _token_mean(token_entropy, coeff, train)

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
        return -coeff * torch.special.entr(routing.scores.mean(0)).sum() * share(routing, num_tokens)

    return Balancer(loss, keep_bias, train=train)


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

    # An expert with less than the mean load is made more attractive. The clamp avoids a division by a mean of 0.
    def post_step(load: Tensor, expert_bias: Tensor) -> Tensor:
        if rule == "quantile":
            change = quantile_shift(load)
        else:
            load = load.to(expert_bias.dtype)
            mean = load.mean(-1, keepdim=True)
            change = torch.sign(mean - load) if rule == "sign" else (mean - load) / mean.clamp(min=1)
        expert_bias = expert_bias + rate * change
        return expert_bias - expert_bias.mean(-1, keepdim=True) if recenter else expert_bias

    # 1 until the last part of the run, over which it falls linearly to 0.
    def schedule(progress: float) -> float:
        return min(1.0, (1 - progress) / decay_ratio) if decay_ratio else 1.0

    # Only quantiles need to know by how much each token missed each expert.
    observe = margin_counts if rule == "quantile" else None
    return Balancer(no_loss, post_step, observe=observe, schedule=schedule)


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


BALANCERS: dict[str, Callable[..., Balancer]] = {
    "aux_loss": aux_loss,
    "z_loss": z_loss,
    "entropy_loss": entropy_loss,
    "loss_free": loss_free,
}
