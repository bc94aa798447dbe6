"""What routers share: the Routing they return, selection with bias and groups, noise, and capacity.

Shapes: T tokens, E experts, K top_k, N = T * K choices.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

DropPolicy = Literal["position", "score"]
Factor = tuple[int, int]  # numerator, denominator


class Routing(NamedTuple):
    """What a router decided for T tokens. Everything about balance is a function of it."""

    router_logits: Tensor  # (T, E) fp32, before temperature, noise and bias
    scores: Tensor  # (T, E) fp32, sums to 1 over experts: the probabilities that balance losses use
    topk_scores: Tensor  # (T, K) fp32, the weights that combine the experts' outputs; 0 where a choice is not kept
    topk_experts: Tensor  # (T, K) int64; E in an unused slot, where a token has no K-th expert
    tokens_per_expert: Tensor  # (E,) int64, the load: what was chosen, before any drops
    selection: Tensor | None = None  # (T, E) fp32, what the choice compared before the bias; no gradient
    kept: Tensor | None = None  # (T, K) bool, the choices that are computed; None: all of them
    capacity: int | None = None  # where `kept` is given, at most E * capacity choices are computed; None: any number
    has_unused: bool = False  # whether a token may have fewer experts than slots, by the router's own choice
    mean_k: int | None = None  # choices a token is to have on average, where selection + bias > 0 is what makes one
    num_identity_experts: int = 0  # the last of the E, which give a token back as it is; a MoE layer fills it in
    measures: Mapping[str, Any] | None = None  # what balancers measured in the layer's forward, by their names


# (router_logits_TE, expert_bias_E or None) -> Routing; one that takes more by these names gets it: the layer's input
# (T, D), the module that the logits came from, the layer's number, and `Places` of the tokens, (B, S) each
Router = Callable[..., Routing]
OFFERED = ("x", "router", "layer", "positions", "document_ids")


class Places(NamedTuple):
    """Where the T = B * S tokens of a forward pass are in their text; int64, (B, S) each."""

    positions: Tensor  # in the sequence
    document_ids: Tensor  # in the order of the sequence, from 0: which of its documents a token is of


class ParametricRouter(NamedTuple):
    """A router with parameters of its own: `init(dim, num_experts)` makes the module that gives a layer's logits.

    The module maps a layer's input (T, D) to logits (T, E), in place of a matrix, with its parameters in fp32. It holds
    parameters only, which are filled by their names as all others are, and belong to the group `router`. Without `init`
    the logits are those of a linear layer, and the router only says what it needs: with `whole_sequences` a token's
    choice depends on others of its sequence, and layouts in which ranks have parts of sequences are refused.
    """

    route: Router
    init: Callable[[int, int], nn.Module] | None = None
    whole_sequences: bool = False


def parametric(router: Router | ParametricRouter) -> ParametricRouter:
    """A router with what it needs beside logits and bias: nothing, if it is a function."""
    return router if isinstance(router, ParametricRouter) else ParametricRouter(router)


class Options(NamedTuple):
    """The arguments shared by the routers in which each token chooses its experts."""

    top_k: int
    temperature: float
    num_groups: int
    topk_groups: int
    jitter: float
    noise_std: float
    capacity_factor: Factor = (0, 1)
    drop_policy: DropPolicy = "position"

    def check(self) -> None:
        """Raise ValueError for values that are wrong whatever the number of experts."""
        check_top_k(self.top_k, self.temperature)
        if self.num_groups < 1 or not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(
                f"router.topk_groups ({self.topk_groups}) must be from 1 to router.num_groups ({self.num_groups})"
            )
        if not 0 <= self.jitter < 1 or self.noise_std < 0:
            raise ValueError(
                f"router.jitter ({self.jitter}) must be at least 0 and below 1, and router.noise_std "
                f"({self.noise_std}) at least 0"
            )


def check_top_k(top_k: int, temperature: float) -> None:
    """Raise ValueError unless top_k is at least 1 and the temperature above 0."""
    if top_k < 1:
        raise ValueError(f"router top_k ({top_k}) must be at least 1")
    if not temperature > 0:
        raise ValueError(f"router temperature ({temperature}) must be above 0")


class ParameterError(ValueError):
    """A function of a part can't be called as it will be; the message says which function, and where it is."""


def asked_for(function: Callable[..., object], offered: tuple[str, ...], given: int = 2) -> tuple[str, ...]:
    """Which of `offered` a function takes, by the names of its parameters after the first `given`, which it gets too.

    Raises ParameterError where it does not take these, or needs something else.
    """
    # A loss is asked at every step, so that answers are kept; an object whose class compares has perhaps no hash.
    try:
        hash(function)
    except TypeError:
        return _asked_for.__wrapped__(function, offered, given)
    return _asked_for(function, offered, given)


@functools.cache
def _asked_for(function: Callable[..., object], offered: tuple[str, ...], given: int) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return ()

    # What comes by position: its number is all that can be compared, as everybody has other names for it.
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [parameter for parameter in parameters if parameter.kind in by_position][:given]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(first) < given and not takes_any:
        raise ParameterError(f"{place_of(function)} must take {given} arguments by position, and takes {len(first)}")

    # The rest it gets by name, so that a name of nothing that there is can only be a mistake.
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = {parameter.name for parameter in first}
    more = [parameter for parameter in parameters if parameter.name not in positional and parameter.kind in by_name]
    for parameter in more:
        if parameter.default is inspect.Parameter.empty and parameter.name not in offered:
            raise ParameterError(
                f"{place_of(function)} takes {parameter.name!r}, which is not offered: {', '.join(offered)} are"
            )
    return tuple(parameter.name for parameter in more if parameter.name in offered)


def place_of(function: Any) -> str:
    """The name of a function with its file and line, `route at my_moe.py:12`; of an object that of its `__call__`."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    name = getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return name if code is None else f"{name} at {Path(code.co_filename).name}:{code.co_firstlineno}"


def scaled_logits(logits_TE: Tensor, options: Options) -> Tensor:
    """The noisy logits over the temperature; without noise where no gradient is recorded, as in evaluation.

    `jitter` multiplies each logit by a uniform number of [1 - jitter, 1 + jitter]. Switch (section 2.4) and ST-MoE
    multiply the router's *input* by such numbers; ours is that jitter on its output. `noise_std` adds a normal number
    of that standard deviation: Shazeer et al. (2017), equation 4, with the constant in place of their softplus(x W),
    so there is no noise matrix to learn, and their load loss, which is made for it, is not here. Both act on choice,
    weights and probabilities alike. The numbers come from the device's generator, which activation checkpointing
    rewinds and the trainer seeds at every step by seed, step and rank: recomputed and resumed steps draw the same.
    """
    z_TE = logits_TE
    if torch.is_grad_enabled():
        if options.jitter:
            z_TE = z_TE * (1 + options.jitter * (2 * torch.rand_like(z_TE) - 1))
        if options.noise_std:
            z_TE = z_TE + options.noise_std * torch.randn_like(z_TE)
    return z_TE if options.temperature == 1 else z_TE / options.temperature


def select(selection_TE: Tensor, expert_bias_E: Tensor | None, options: Options) -> Tensor:
    """The (T, K) indices of the largest selection scores after the bias; carries no gradient."""
    num_experts = selection_TE.shape[-1]
    if options.top_k > num_experts:
        raise ValueError(f"router top_k ({options.top_k}) must be at most num_experts ({num_experts})")
    selection_TE = selection_TE.detach()
    if expert_bias_E is not None:
        selection_TE = selection_TE + expert_bias_E.float()
    if options.num_groups > 1:
        selection_TE = limit_groups(selection_TE, options)
    return selection_TE.topk(options.top_k, dim=-1).indices


def limit_groups(selection_TE: Tensor, options: Options) -> Tensor:
    """-inf outside each token's best `topk_groups` of `num_groups` groups of adjacent experts.

    A group counts the sum of its top_k / topk_groups (rounded down, at least one) largest scores. Source: DeepSeek-V3
    (2024), section 2.1.2, node-limited routing; Megatron-core's `group_limited_topk`. Raises ValueError when the
    groups don't divide the experts or the chosen ones hold fewer than top_k.
    """
    # A router is built without knowing the number of experts, so this is the first place where it can be compared.
    T, E = selection_TE.shape
    G, topk_groups = options.num_groups, options.topk_groups
    if E % G:
        raise ValueError(f"router.num_groups ({G}) must divide moe.num_experts ({E})")
    if topk_groups * (E // G) < options.top_k:
        raise ValueError(
            f"router.topk_groups ({topk_groups}) of router.num_groups ({G}) hold {topk_groups * (E // G)} experts, "
            f"fewer than moe.top_k ({options.top_k})"
        )

    # A group is worth its best experts, as many as a token takes of each chosen group when it takes equally of all.
    grouped_TGE = selection_TE.view(T, G, -1)  # (T, G, E / G)
    experts_that_count = min(max(1, options.top_k // topk_groups), E // G)
    value_TG = grouped_TGE.topk(experts_that_count, dim=-1).values.sum(-1)  # (T, G)

    # The mask is made by comparing, not by a scatter, for the reason in `rank_in_expert`.
    chosen_TKG = value_TG.topk(topk_groups, dim=-1).indices.unsqueeze(-1) == torch.arange(G, device=value_TG.device)
    return grouped_TGE.masked_fill(~chosen_TKG.any(1).unsqueeze(-1), -math.inf).view(T, E)


def normalized(scores: Tensor) -> Tensor:
    """Scores divided by their sum over the last dimension + 1e-20."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def make_routing(
    logits_TE: Tensor,
    scores_TE: Tensor,
    topk_scores_TK: Tensor,
    topk_experts_TK: Tensor,
    selection_TE: Tensor | None = None,
    *,
    used_TK: Tensor | None = None,
    mean_k: int | None = None,
    capacity: int | None = None,
) -> Routing:
    """A Routing with its counts.

    Where `used_TK`, a bool, is false, the slot is unused: it is no choice, whatever id and score it has here. `mean_k`
    and `capacity` are fields of `Routing`. Raises ValueError for a `used_TK` of another shape or type.
    """
    # Unused slots have a place in the counts that is cut off. A scatter because bincount has a data-dependent shape.
    E = logits_TE.shape[-1]
    if used_TK is not None:
        if used_TK.shape != topk_experts_TK.shape or used_TK.dtype != torch.bool:
            raise ValueError(
                f"used_TK must be a bool for each of topk_experts, {tuple(topk_experts_TK.shape)}, "
                f"is {tuple(used_TK.shape)} {used_TK.dtype}"
            )
        topk_experts_TK = torch.where(used_TK, topk_experts_TK, E)
        topk_scores_TK = topk_scores_TK * used_TK
    ids_N = topk_experts_TK.flatten()  # (T, K) -> (N,)
    counts = ids_N.new_zeros(E if used_TK is None else E + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))
    return Routing(
        router_logits=logits_TE,
        scores=scores_TE,
        topk_scores=topk_scores_TK,
        topk_experts=topk_experts_TK,
        tokens_per_expert=counts[:E],
        selection=None if selection_TE is None else selection_TE.detach(),
        kept=used_TK,
        capacity=capacity,
        has_unused=used_TK is not None,
        mean_k=mean_k,
    )


def with_identity_experts(routing: Routing, num_identity_experts: int) -> Routing:
    """The routing of a layer whose last experts are identity experts, so many; it has nothing measured yet."""
    # Not _replace, which torch.compile can't give out in torch 2.11.
    return Routing(*routing[:-2], num_identity_experts) if num_identity_experts else routing


def drop_over_capacity(routing: Routing, options: Options) -> Routing:
    """Drop the choices for which an expert has no room, when there is a capacity factor and gradients are recorded.

    An expert computes ceil(T * K / E * capacity_factor) tokens of a forward pass on one rank. By `position` the first
    ones, all first choices before all second ones (GShard, algorithm 1; Switch, section 2.2); by `score` those with the
    largest probability of the expert (batch-prioritised routing, Riquelme et al. 2021; Megatron-core's `probs`). The
    weights of what is kept don't change; a token that no expert computes passes by the residual alone. Evaluation drops
    nothing: what a token gets there must not depend on the others of its batch.
    """
    if options.capacity_factor[0] == 0 or not torch.is_grad_enabled():
        return routing
    ids_TK = routing.topk_experts
    T, K = ids_TK.shape
    E = routing.scores.shape[-1]
    capacity = capacity_of(T, K, E, options.capacity_factor)

    # The order in which choices ask for room. By position all first choices come before all second ones, so that no
    # token loses its first choice to another's second.
    if options.drop_policy == "score":
        order_N = routing.scores.detach().gather(-1, ids_TK).flatten().argsort(descending=True, stable=True)
    else:
        order_N = torch.arange(T * K, device=ids_TK.device).view(T, K).t().flatten()  # (N,)
    kept_TK = rank_in_expert(ids_TK.flatten(), order_N, routing.tokens_per_expert).view(T, K) < capacity  # (T, K)

    # The load stays as it was chosen: balancing must see what the router wanted, not what fitted.
    return Routing(  # not _replace, which torch.compile can't give out of a graph in torch 2.11
        router_logits=routing.router_logits,
        scores=routing.scores,
        topk_scores=routing.topk_scores * kept_TK,
        topk_experts=ids_TK,
        tokens_per_expert=routing.tokens_per_expert,
        selection=routing.selection,
        kept=kept_TK,
        capacity=capacity,
    )


def exact_factor(capacity_factor: float) -> Factor:
    """The fraction that a factor stands for, with a denominator of a million at most: (11, 10) for 1.1.

    Only 0 becomes 0. Raises ValueError for a negative or infinite factor.
    """
    if not 0 <= capacity_factor < math.inf:
        raise ValueError(f"router.capacity_factor ({capacity_factor}) must be a finite number, at least 0")
    fraction = Fraction(capacity_factor).limit_denominator(1_000_000)
    return (fraction or Fraction(capacity_factor > 0, 1_000_000)).as_integer_ratio()


def capacity_of(num_tokens: int, top_k: int, num_experts: int, factor: Factor) -> int:
    """The most tokens that an expert has room for: ceil(num_tokens * top_k / num_experts * factor), or all of them.

    In integers: 1.1 times 100 is 110, where floating point has 110.00000000000001, and Megatron-core so 111.
    """
    numerator, denominator = factor
    if numerator * top_k >= denominator * num_experts:
        return num_tokens
    return -(-num_tokens * top_k * numerator // (num_experts * denominator))


def rank_in_expert(expert_N: Tensor, order_N: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """How many entries of the same expert come before each entry, in the order given: (N,) int64."""
    # Sorted by expert and then by the order, an entry's rank is its distance from the first entry of its expert.
    sorted_N = order_N[expert_N[order_N].argsort(stable=True)]
    start_E = tokens_per_expert_E.cumsum(0) - tokens_per_expert_E
    rank_N = torch.arange(expert_N.numel(), device=expert_N.device) - start_E[expert_N[sorted_N]]

    # Back to the entries' own places. Not a scatter: inductor 2.13 reads a fused scatter's output before it writes it.
    return rank_N[sorted_N.argsort()]


def force_balanced(router: Router) -> Router:
    """A router that deals the experts out in turn, for measuring speed at perfect balance (a debugging aid).

    Choice k of token t is expert (t * K + k) mod E, whatever the logits; its weight is the given router's score there.
    Where slots are unused, these stay so, and the others are dealt the experts in turn.
    """

    @functools.wraps(router)  # takes what it takes
    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None, **asked: Any) -> Routing:
        routing = router(router_logits_TE, expert_bias_E, **asked)
        ids_TK = routing.topk_experts

        # As many rows as the router has: with those of unused slots a measure of speed would be of other work.
        used_TK = routing.kept if routing.has_unused else None
        slots_N = torch.arange(ids_TK.numel(), device=ids_TK.device)
        if used_TK is not None:
            slots_N = (used_TK.flatten().cumsum(0) - 1).clamp(min=0)
        dealt_TK = (slots_N % routing.scores.shape[-1]).view_as(ids_TK)  # (N,) -> (T, K)
        dealt_scores_TK = routing.scores.gather(-1, dealt_TK)
        return make_routing(
            routing.router_logits,
            routing.scores,
            dealt_scores_TK,
            dealt_TK,
            routing.selection,
            used_TK=used_TK,
            mean_k=routing.mean_k,
            capacity=routing.capacity if routing.has_unused else None,
        )

    return route
