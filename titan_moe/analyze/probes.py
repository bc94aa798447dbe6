"""What takes more than counts, on a few sequences: their choices, outputs of all experts, losses without some experts.

Shapes: L MoE layers, E experts, K choices, B sequences, S positions, D dim, n tokens of a sample.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.analyze.counts import choices_of
from titan_moe.diagnostics import NO_EXPERT, routing_drift, set_routes
from titan_moe.model.moe import MoE
from titan_moe.model.routing import Router, Routing
from titan_moe.model.transformer import Transformer
from titan_moe.runtime import world
from titan_moe.runtime.world import all_reduce_sum

OUTPUTS_PER_SEQUENCE = 16  # tokens of a sequence whose outputs are compared
OUTPUT_ROWS = 1 << 14  # rows of experts' outputs in memory at a time


class KeptSequence(NamedTuple):
    """A sequence that a pass keeps on the host, with the experts of its tokens."""

    text: int
    number: int  # of the text's sequences, in the order of an evaluation
    tokens: Tensor  # (S,)
    labels: Tensor  # (S,)
    experts: Tensor  # (L, S, K) int16, the largest weight first; NO_EXPERT for none
    weights: Tensor  # (L, S, K) fp32


class Pruning(NamedTuple):
    """Losses without some experts, nats per token."""

    num_tokens: int
    loss: float
    curve: list[tuple[int, float]]  # experts removed from each layer, the least loaded first, and the loss
    single: Tensor | None  # (L, E): the loss without this expert alone, minus `loss`; None where it costs too much


def keep_sequences(
    text: int, numbers: Sequence[int], tokens: Tensor, labels: Tensor, routings: Sequence[Routing]
) -> list[KeptSequence]:
    """The first sequences of a batch (B, S), as many as there are `numbers` for."""
    # Absent choices have weight 0, and so come last.
    E = routings[0].scores.shape[-1]
    choices = choices_of(routings)  # (L, T, K)
    weights = torch.stack([F.pad(r.topk_scores, (0, choices.shape[-1] - r.topk_scores.shape[1])) for r in routings])
    weights, order = weights.float().sort(dim=-1, descending=True, stable=True)
    experts = choices.gather(-1, order)
    experts = torch.where(experts < E, experts, NO_EXPERT).to(torch.int16)

    # One copy from the device for the batch. Each sequence has memory of its own: a view would be sent with the batch.
    B = tokens.shape[0]
    experts, weights = (x.unflatten(1, (B, -1))[:, : len(numbers)].cpu() for x in (experts, weights))  # (L, b, S, K)
    tokens, labels = tokens.cpu(), labels.cpu()
    return [
        KeptSequence(text, number, *(x.clone() for x in (tokens[i], labels[i], experts[:, i], weights[:, i])))
        for i, number in enumerate(numbers)
    ]


def of_all_ranks(sequences: Sequence[KeptSequence]) -> list[KeptSequence]:
    """The kept sequences of all ranks, by text and number."""
    parts: list[Any] = world.all_gather(list(sequences))
    return sorted((sequence for part in parts for sequence in part), key=lambda one: (one.text, one.number))


def batches_of(
    sequences: Sequence[KeptSequence], per_text: int, size: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels (b, S), b <= size, of those of the first `per_text` sequences of each text that are given."""
    chosen = [sequence for sequence in sequences if sequence.number < per_text]
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [
        (
            torch.stack([one.tokens for one in part]).to(device),
            torch.stack([one.labels for one in part]).to(device),
        )
        for part in parts
    ]


@torch.no_grad()
def output_similarity(model: Transformer, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean cosine of the outputs that two experts give to the same token, chosen or not: (L, E, E).

    Of OUTPUTS_PER_SEQUENCE tokens of each sequence, at even distances; over the batches of all ranks.
    """
    layers = model.moe_layers()
    E, device = layers[0].router_width, next(model.parameters()).device
    sums = torch.zeros(len(layers), E, E, dtype=torch.float64, device=device)
    number = torch.zeros((), dtype=torch.int64, device=device)

    # A layer's input is seen from outside, by hooks that are there for this alone.
    inputs: dict[MoE, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})) for layer in layers]
    try:
        for tokens, _ in batches:
            model(tokens, want="routings")
            S = tokens.shape[1]
            n = min(S, OUTPUTS_PER_SEQUENCE)
            places = torch.arange(n, device=device) * S // n
            number += tokens.shape[0] * n
            sums += torch.stack([cosine_sum(layer, inputs[layer][:, places].flatten(0, 1)) for layer in layers])
    finally:
        for hook in hooks:
            hook.remove()
    return all_reduce_sum(sums) / all_reduce_sum(number)


def cosine_sum(layer: MoE, x_nD: Tensor) -> Tensor:
    """The sum over tokens of the cosines between the outputs of each two experts for them, (n, D) -> (E, E).

    E counts identity experts, which are the last: they answer with the token itself.
    """
    E, computed = layer.router_width, layer.num_experts
    total = torch.zeros(E, E, dtype=torch.float64, device=x_nD.device)
    for part in x_nD.split(max(1, OUTPUT_ROWS // E)):
        counts_E = torch.full((computed,), part.shape[0], dtype=torch.int64, device=part.device)
        y = layer.experts(part.repeat(computed, 1), counts_E)
        y = torch.cat([y, part.repeat(E - computed, 1)])  # (E n, D)
        y = F.normalize(y.double(), dim=-1).view(E, -1)  # (E, n D)
        total += y @ y.t()
    return total


def route_without(route: Router, removed_E: Tensor) -> Router:
    """A router for which some experts do not exist: their logits, and their bias if there is one, are -inf.

    So tokens go to others, and weights and probabilities are of those, as in a model from which they were pruned.
    """

    @functools.wraps(route)  # takes what it takes
    def routed(router_logits_TE: Tensor, expert_bias_E: Tensor | None, **asked: Any) -> Routing:
        bias_E = None if expert_bias_E is None else expert_bias_E.masked_fill(removed_E, -math.inf)
        return route(router_logits_TE.masked_fill(removed_E, -math.inf), bias_E, **asked)

    return routed


@contextmanager
def without_experts(model: Transformer, removed_LE: Tensor) -> Iterator[None]:
    """Within the block tokens do not get to these experts."""
    layers = model.moe_layers()
    routes = [layer.route for layer in layers]
    set_routes(layers, [route_without(route, row) for route, row in zip(routes, removed_LE, strict=True)])
    try:
        yield
    finally:
        set_routes(layers, routes)


@torch.no_grad()
def loss_without(model: Transformer, batches: Sequence[tuple[Tensor, Tensor]], removed_LE: Tensor) -> float:
    """The loss over the batches of all ranks where tokens do not get to these experts, nats per token."""
    sums = torch.zeros(2, dtype=torch.float64, device=removed_LE.device)  # nats, tokens
    with without_experts(model, removed_LE):
        for tokens, labels in batches:
            sums[0] += model(tokens, labels, want="score")[0].ce_sum.double()
            sums[1] += labels.numel()
    nats, num_tokens = all_reduce_sum(sums).tolist()
    return nats / num_tokens


def prune(
    model: Transformer, batches: Sequence[tuple[Tensor, Tensor]], load_LE: Tensor, *, top_k: int, passes: int
) -> Pruning:
    """Losses with fewer experts: the least loaded of each layer taken away, and each expert alone.

    Each loss is a pass over the batches. The curve takes up to `passes` of them, the single experts L * E more, and are
    left out where that would be more than `passes` in all.
    """
    L, E = load_LE.shape
    place_LE = load_LE.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 for the least loaded
    none_LE = torch.zeros_like(load_LE, dtype=torch.bool)
    loss = loss_without(model, batches, none_LE)

    # As many experts stay as a token chooses.
    removals = [*(1 << i for i in range((E - top_k).bit_length())), E - top_k]
    removals = sorted({number for number in removals if 0 < number <= E - top_k})[: passes - 1]
    curve = [(0, loss), *((number, loss_without(model, batches, place_LE < number)) for number in removals)]

    single = None
    if len(curve) + L * E <= passes and top_k < E:
        single = torch.zeros(L, E, dtype=torch.float64)
        for layer in range(L):
            for expert in range(E):
                removed_LE = none_LE.clone()
                removed_LE[layer, expert] = True
                single[layer, expert] = loss_without(model, batches, removed_LE) - loss
    num_tokens = all_reduce_sum(torch.tensor(sum(labels.numel() for _, labels in batches), device=load_LE.device))
    return Pruning(int(num_tokens), loss, curve, single)


def agreement(before: Tensor, after: Tensor) -> list[float]:
    """Per layer the share of the choices of `after`, (L, T, K), whose expert the token had in `before`."""
    return [1 - routing_drift(one, other) for one, other in zip(before.split(1), after.split(1), strict=True)]


def changed_sets(before: Tensor, after: Tensor) -> list[float]:
    """Per layer the share of the tokens whose set of experts differs between two sets of choices (L, T, K)."""
    return (before.sort(-1).values != after.sort(-1).values).any(-1).double().mean(-1).tolist()
