"""Measurements that run the model beside training and change nothing: routing drift and the balance tax.

Shapes: B sequences, S positions, L MoE layers, T = B * S tokens, K choices.
"""

import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_moe.model.cross_entropy import IGNORE
from titan_moe.model.moe import MoE
from titan_moe.model.routing import Router, force_balanced
from titan_moe.parallelize.parallelize import reshard

NO_EXPERT = -1  # in the choices of tokens that do not count


@torch.no_grad()
def routing_choices(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The experts that every MoE layer chooses for each token of a batch (B, S), (L, T, K) int16 on the host.

    A token whose label does not count has NO_EXPERT, as has a choice that is not an expert.
    """
    _, routings = model(tokens, want="routings")
    reshard(model)  # no backward pass follows that would do it

    # The same batch's choices are compared with these later: one that means nothing must look the same then.
    counts_T1 = (labels != IGNORE).view(-1, 1)
    choices = []
    for routing in routings:
        is_expert_TK = counts_T1 & (routing.topk_experts < routing.scores.shape[-1])  # (T, K)
        choices.append(torch.where(is_expert_TK, routing.topk_experts, NO_EXPERT).to(torch.int16))
    return torch.stack(choices).cpu()


def of_whole_sequences(choices: Tensor, positions: Tensor, sequences: int, group: dist.ProcessGroup | None) -> Tensor:
    """Join the choices (L, T, K) of the ranks of `group`, which have parts of the same sequences, in the whole's order.

    `positions` are those of this rank, of each sequence. Every rank gets the same, and one that has all would too.
    """
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, (positions, choices.unflatten(1, (sequences, -1))), group=group)

    # A rank may have pieces of a sequence that are not neighbours: positions say where each token belongs.
    order = torch.cat([part_positions for part_positions, _ in parts]).argsort()
    choices = torch.cat([part for _, part in parts], dim=2)  # (L, B, S, K)
    return choices[:, :, order].flatten(1, 2)


def routing_drift(before: Tensor, after: Tensor) -> float:
    """Part of the choices (L, T, K) of `after` whose expert the token did not have in `before`.

    The order of a token's choices does not matter; 0 when all tokens keep their experts, 1 when none keeps any, NaN
    when the two are of different batches (a run that went on with another batch size) or no token counts.
    """
    if before.shape != after.shape:
        return math.nan

    # Each choice of now is looked for among all K of before, whatever their order: (L, T, K, 1) and (L, T, 1, K).
    counts_LTK = after != NO_EXPERT
    kept_LTK = (after.unsqueeze(-1) == before.unsqueeze(-2)).any(-1)
    return ((counts_LTK & ~kept_LTK).sum() / counts_LTK.sum()).item()


def balance_tax(model: nn.Module, tokens: Tensor, labels: Tensor, repeats: int = 3) -> float:
    """Tokens/s of forward and backward with the learned router over tokens/s with forced balance, on one batch (B, S).

    1 where imbalance costs nothing, 0.5 where it halves the speed. One pass of each warms up, then `repeats` of each
    alternate and the medians count, so it takes the time of 2 * (repeats + 1) micro-batches. Call it on every rank
    and between steps: gradients are discarded, random states are put back, and no weight is touched.
    """
    # Only the routers differ between the two, so that all else costs both the same.
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    learned = [layer.route for layer in layers]
    forced = [_forced(route) for route in learned]

    # Passes alternate, so that what else the machine does slows both down. Routers with noise draw random numbers,
    # which training is to find as they were.
    device = tokens.device
    times: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for _ in range(repeats + 1):
                for is_forced, routes in ((False, learned), (True, forced)):
                    set_routes(layers, routes)
                    times[is_forced].append(_seconds(model, tokens, labels))
        finally:
            set_routes(layers, learned)
            model.zero_grad()

    # The first pass of each warmed up: it made memory and kernels.
    return statistics.median(times[True][1:]) / statistics.median(times[False][1:])


def rehearse(model: nn.Module, tokens: Tensor, labels: Tensor) -> None:
    """Run forward and backward on a batch (B, S) and discard what comes out, between steps and on every rank.

    torch.compile makes code for the first shape that it sees, and for any number of rows where another one follows: a
    run that begins with something else than training has training's code made for its shape by this.
    """
    _seconds(model, tokens, labels)


@functools.cache
def _forced(route: Router) -> Router:
    """One forced router for each learned one: torch.compile takes a new function for new code."""
    return force_balanced(route)


def set_routes(layers: Sequence[MoE], routes: Sequence[Router]) -> None:
    """Give each MoE layer another router, from outside and for a while."""
    for layer, route in zip(layers, routes, strict=True):
        layer.route = route


def _seconds(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Time of forward, cross-entropy and backward."""
    _wait(tokens.device)  # a GPU may still be busy with earlier work
    begin = time.perf_counter()
    ce_sum, _ = model(tokens, labels)
    (ce_sum / labels.numel()).backward()
    _wait(tokens.device)  # the calls return before it has done what they ask for
    spent = time.perf_counter() - begin
    model.zero_grad()
    return spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
