"""One training step and one evaluation step: read from here.

Shapes: B sequences, S positions, V vocabulary, L MoE layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from titan_moe.balancer import Balancer, token_entropy, token_z_loss
from titan_moe.metrics import EvalOutput, StepOutput
from titan_moe.model.cross_entropy import IGNORE
from titan_moe.model.routing import Routing
from titan_moe.optimizer.combined import clip_gradients, step_if_finite
from titan_moe.optimizer.expert_stats import ExpertStats, copies, expert_parameters, expert_stats, expert_sums
from titan_moe.parallelize.grad import grad_squares
from titan_moe.parallelize.parallelize import reshard, set_last_micro_batch
from titan_moe.runtime.world import all_reduce_sum

# Each balancer at coefficient 1, with its coefficient beside it: values are reported before their coefficients.
Balancers = Mapping[str, tuple[float, Balancer]]


def train_step(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    balancers: Balancers,
    expert_biases: Sequence[Tensor],
    *,
    max_norm: float,
    progress: float = 0.0,
    measure_experts: bool = False,
    sequence_group: dist.ProcessGroup | None = None,
) -> StepOutput:
    """Update the model once from all micro-batches of tokens and labels (B, S) that this rank holds.

    `expert_biases` are the selection biases (E,) of the MoE layers, in order, or empty. Every returned number is over
    all ranks and micro-batches. The loss is a sum divided by the global number of tokens of the step, so gradients do
    not depend on how the step is cut into ranks and micro-batches. `progress` is the part of the run that is done
    with this step, for balancers with a schedule. With `measure_experts` the output has `expert_stats`, at the cost of
    a copy of this rank's experts during the step. `sequence_group` are the ranks that hold parts of the same
    sequences, where a rank has not all of them. A step with a loss, gradient norm or router logit that is NaN or
    infinite is `skipped`: weights, optimizer states and selection biases stay as they are.
    """
    num_tokens = all_reduce_sum(sum_tensors([(labels != IGNORE).sum() for _, labels in micro_batches]))
    scopes = {balancer.scope for _, balancer in balancers.values()}
    whole_LE = route_ahead(model, micro_batches) if "global_batch_exact" in scopes else None
    sums, loads, observations = [], [], []
    for number, (tokens, labels) in enumerate(micro_batches, start=1):
        set_last_micro_batch(model, number == len(micro_batches))
        ce_sum, routings = model(tokens, labels)
        loads.append(stack_loads(routings, device=tokens.device, reduce="global_batch" in scopes))
        observations.append(observe(routings, expert_biases, balancers))
        ce = ce_sum / num_tokens
        own = own_loads(routings, scopes, tokens.shape[0], sequence_group)
        scoped = scoped_loads(own, scopes, so_far_LE=loads, whole_LE=whole_LE)
        balance = balance_losses(routings, balancers, scoped, num_tokens)
        trained = [balancers[name][0] * value for name, value in balance.items() if balancers[name][1].train]
        loss = sum_tensors([ce, *trained])
        loss.backward()
        scalars = torch.stack([value.detach().float() for value in (loss, ce, *balance.values())])
        sums.append(torch.cat([scalars, router_sums(routings, scalars)]))
    totals = all_reduce_sum(sum_tensors(sums))
    total_loss, ce, *balance_values = totals[: 2 + len(balance)].unbind()
    load_LE = sum_tensors(loads)
    if "global_batch" not in scopes:
        all_reduce_sum(load_LE)  # one collective for all layers

    squares = grad_squares(model.named_parameters())
    norm = squares.norm()
    clip_gradients(optimizer, norm, max_norm)
    means = router_means(totals[2 + len(balance) :], load_LE)
    finite = is_finite(total_loss, norm, means.get("nonfinite"))
    experts = expert_parameters(model.named_parameters()) if measure_experts else {}
    before = copies(experts)
    load_factors = step_if_finite(optimizer, load_LE, finite)
    optimizer.zero_grad()
    update_expert_biases(expert_biases, load_LE, observations, balancers, progress, finite)
    return StepOutput(
        loss=ce,
        balance_losses=dict(zip(balance, balance_values, strict=True)),
        total_loss=total_loss,
        grad_norm=norm,
        load=load_LE,
        num_tokens=num_tokens,
        load_factors=load_factors,
        **means,
        expert_stats=measured(experts, before, optimizer) if experts else None,
        skipped=~finite,
        nonfinite_gradients=squares.nonfinite,
    )


@torch.no_grad()
def eval_step(model: nn.Module, tokens: Tensor, labels: Tensor, token_bytes: Tensor) -> EvalOutput:
    """Sums over one validation batch (B, S) of this rank; a batch whose labels are all ignored counts nothing.

    `token_bytes` (V,) is the number of UTF-8 bytes of each token.
    """
    score, routings = model(tokens, labels, want="score")
    counts = labels != IGNORE
    counted = counts.any()  # a batch is real or a dummy that only keeps this rank in step with the others
    return EvalOutput(
        loss_sum=score.ce_sum.double(),
        num_correct=score.num_correct,
        num_tokens=counts.sum(),
        num_bytes=(token_bytes[labels.clamp(min=0)] * counts).sum(),
        load=stack_loads(routings, device=tokens.device) * counted,
        scores_sum=stack([r.scores.sum(0) for r in routings], score.ce_sum) * counted,
        z_loss_sum=stack([token_z_loss(r).sum() for r in routings], score.ce_sum) * counted,
        entropy_sum=stack([token_entropy(r).sum() for r in routings], score.ce_sum) * counted,
    )


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> EvalOutput:
    """Sums over all validation batches of all ranks, each of which must have the same number of batches."""
    outputs = [eval_step(model, tokens, labels, token_bytes) for tokens, labels in batches]
    reshard(model)
    return EvalOutput(*(all_reduce_sum(sum_tensors(field)) for field in zip(*outputs, strict=True)))


@torch.no_grad()
def route_ahead(model: nn.Module, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The load (L, E) of the whole step, all ranks, by a forward pass over all micro-batches before the real ones."""
    loads = [stack_loads(model(tokens, want="routings")[1], device=tokens.device) for tokens, _ in micro_batches]
    return all_reduce_sum(sum_tensors(loads))


@torch.no_grad()
def own_loads(
    routings: Sequence[Routing], scopes: Iterable[str], sequences: int, group: dist.ProcessGroup | None
) -> dict[str, Sequence[Tensor]]:
    """The loads of this micro-batch of whole sequences, of every layer: `micro_batch` (E,), `sequence` (B, E)."""
    loads: dict[str, Sequence[Tensor]] = {"micro_batch": [r.tokens_per_expert for r in routings]}
    if "sequence" in scopes:
        loads["sequence"] = [sequence_load(r, sequences) for r in routings]
    if group is None or not routings:
        return loads
    stacked = {scope: torch.stack(list(own)) for scope, own in loads.items()}
    return {scope: all_reduce_sum(load, group).unbind() for scope, load in stacked.items()}


def scoped_loads(
    own: Mapping[str, Sequence[Tensor]],
    scopes: Iterable[str],
    *,
    so_far_LE: Sequence[Tensor],
    whole_LE: Tensor | None,
) -> dict[str, Sequence[Tensor]]:
    """For each scope in use the load of every layer as `Balancer.loss` wants it; `own` are those of `own_loads`.

    `so_far_LE` are the loads of this micro-batch and the ones before, of all ranks when `global_batch` is in use.
    """
    loads = dict(own)
    if "global_batch" in scopes:
        loads["global_batch"] = sum_tensors(so_far_LE).unbind()
    if whole_LE is not None:
        loads["global_batch_exact"] = whole_LE.unbind()
    return loads


def sequence_load(routing: Routing, sequences: int) -> Tensor:
    """Tokens per expert of each sequence, (B, E) int64, of a micro-batch of B sequences."""
    ids_BN = routing.topk_experts.view(sequences, -1)
    counts_BE = ids_BN.new_zeros(sequences, routing.scores.shape[-1])
    return counts_BE.scatter_add_(1, ids_BN, torch.ones_like(ids_BN))


def balance_losses(
    routings: Sequence[Routing], balancers: Balancers, loads: Mapping[str, Sequence[Tensor]], num_tokens: Tensor
) -> dict[str, Tensor]:
    """Each balancer's loss at coefficient 1, mean over layers, as this micro-batch's share of the step."""
    losses = {}
    for name, (_, balancer) in balancers.items():
        if balancer.has_loss:
            with torch.set_grad_enabled(balancer.train):
                layers = zip(routings, loads[balancer.scope], strict=True)
                losses[name] = sum_tensors([balancer.loss(r, load, num_tokens) for r, load in layers]) / len(routings)
    return losses


@torch.no_grad()
def observe(routings: Sequence[Routing], expert_biases: Sequence[Tensor], balancers: Balancers) -> dict[str, Tensor]:
    """What the balancers' post steps want to know of this micro-batch beside its load, stacked over layers."""
    return {
        name: torch.stack([balancer.observe(r, bias) for r, bias in zip(routings, expert_biases, strict=True)])
        for name, (_, balancer) in balancers.items()
        if balancer.observe is not None
    }


@torch.no_grad()
def update_expert_biases(
    expert_biases: Sequence[Tensor],
    load_LE: Tensor,
    observations: Sequence[Mapping[str, Tensor]],
    balancers: Balancers,
    progress: float,
    finite: Tensor | None = None,
) -> None:
    """Apply the balancers' post steps: the only write to model state outside the optimizer.

    `load_LE` is of all ranks, the `observations` are those of this rank's micro-batches. Where `finite`, a bool scalar,
    is false, nothing changes.
    """
    post_steps = {name: b for name, (_, b) in balancers.items() if b.moves_bias}
    if not post_steps:
        return
    bias_LE = before_LE = torch.stack(list(expert_biases))
    for name, balancer in post_steps.items():
        seen = load_LE
        if balancer.observe is not None:
            seen = all_reduce_sum(sum_tensors([observed[name] for observed in observations]))
        moved_LE, factor = balancer.post_step(seen, bias_LE), balancer.schedule(progress)
        bias_LE = moved_LE if factor == 1 else torch.lerp(bias_LE, moved_LE, factor)
    if finite is not None:
        bias_LE = torch.where(finite, bias_LE, before_LE)
    torch._foreach_copy_(list(expert_biases), list(bias_LE.unbind()))


def is_finite(total_loss: Tensor, norm: Tensor, nonfinite_L: Tensor | None) -> Tensor:
    """Whether a step may change anything, a bool scalar that stays on the device; alike on all ranks.

    `nonfinite_L` is above 0 in layers with a router logit that is NaN or infinite: the choices there mean nothing.
    """
    finite = total_loss.isfinite() & norm.isfinite()
    return finite if nonfinite_L is None else finite & (nonfinite_L == 0).all()


def measured(experts: Mapping[nn.Parameter, int], before: Sequence[Tensor], optimizer: Optimizer) -> ExpertStats:
    """What the optimizer's step did to each expert, over all ranks; `before` are their parameters of before."""
    return expert_stats(experts, all_reduce_sum(expert_sums(experts, before, optimizer)), optimizer)


@torch.no_grad()
def router_sums(routings: Sequence[Routing], like: Tensor) -> Tensor:
    """Sums over tokens, fp32, of all layers one after the other: what `router_means` makes means of.

    They are 2-norms of a token's logits, largest scores, ones, a flag (0 or 1, it stays on the device) whether any
    logit is NaN or infinite; and where choices can be lost, lost choices and tokens that no expert computes.
    """
    norms = [torch.linalg.vector_norm(r.router_logits, dim=-1).sum() for r in routings]
    confidences = [r.scores.amax(-1).sum() for r in routings]
    counts = [like.new_full((), float(r.scores.shape[0])) for r in routings]
    nonfinite = [(~r.router_logits.isfinite()).any().to(like) for r in routings]
    kept = [(r, r.kept) for r in routings if r.kept is not None]
    dropped = [((r.topk_experts < r.scores.shape[-1]) & ~k).sum().to(like) for r, k in kept]
    unrouted = [(~k.any(-1)).sum().to(like) for _, k in kept]
    sums = [*norms, *confidences, *counts, *nonfinite, *dropped, *unrouted]
    return torch.stack(sums) if sums else like.new_zeros(0)


def router_means(sums: Tensor, load_LE: Tensor) -> dict[str, Any]:
    """The fields of a `StepOutput`, (L,) each, from `router_sums` of the whole step; none for a dense model."""
    if not sums.numel():
        return {}
    norm_L, confidence_L, tokens_L, nonfinite_L, *lost = sums.view(-1, load_LE.shape[0])
    means = {
        "router_logit_norm": norm_L / tokens_L,
        "router_confidence": confidence_L / tokens_L,
        "nonfinite": nonfinite_L,
    }
    if lost:
        dropped_L, unrouted_L = lost
        means |= {"dropped_fraction": dropped_L / load_LE.sum(-1), "unrouted_fraction": unrouted_L / tokens_L}
    return means


def stack_loads(routings: Sequence[Routing], *, device: torch.device, reduce: bool = False) -> Tensor:
    """Tokens per expert of all layers, (L, E) int64, of all ranks with `reduce`; (0,) for a dense model."""
    if not routings:
        return torch.zeros(0, dtype=torch.int64, device=device)
    load_LE = torch.stack([r.tokens_per_expert for r in routings])
    return all_reduce_sum(load_LE) if reduce else load_LE


def stack(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stack in float64; (0,) on the device of `like` where there is nothing to stack."""
    return torch.stack(list(values)).double() if values else like.new_zeros(0, dtype=torch.float64)


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Sum a non-empty sequence, first to last (a fixed order: resumed runs must repeat it to the bit)."""
    return sum(tensors[1:], start=tensors[0])
