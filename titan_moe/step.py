"""One training step and one evaluation step: read from here.

Shapes: B sequences, S positions, V vocabulary, L MoE layers, E experts, Z identity experts; N layers, H query heads, C
channels of a head. What is of routers and balancers has E + Z experts, where (..., E) is written as well.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_moe.balancer import Balancer, Scope, token_entropy, token_z_loss
from titan_moe.metrics import EvalOutput, QKClip, StepOutput, identity_means
from titan_moe.model.cross_entropy import IGNORE
from titan_moe.model.dispatch import computed_choices
from titan_moe.model.routing import Routing
from titan_moe.optimizer.expert_stats import (
    ExpertStats,
    GradientMoments,
    copies,
    expert_parameters,
    expert_stats,
    expert_sums,
    observe_gradients,
)
from titan_moe.optimizer.optimizer import Optimizer, clip_scale
from titan_moe.parallelize.grad import grad_squares
from titan_moe.parallelize.parallelize import reshard, set_last_micro_batch
from titan_moe.runtime.dtensor import gathered, local, local_rows, own_part
from titan_moe.runtime.world import all_reduce_max, all_reduce_sum, world_size

# Each balancer at coefficient 1, with its coefficient beside it: values are reported before their coefficients.
Balancers = Mapping[str, tuple[float, Balancer]]
MicroBatches = Sequence[tuple[Tensor, Tensor]]  # tokens and labels, (B, S) each
Loads = Mapping[Scope, Sequence[Tensor]]  # of every layer, as `Balancer.loss` wants them
States = Mapping[str, Mapping[str, Sequence[Tensor]]]  # of balancers that keep any: name -> key -> of each layer
Sums = dict[str, Tensor]  # what adds up over micro-batches and ranks, by name
Gradients = Callable[..., tuple[Sums, Tensor, list[Tensor]]]  # as `compute_gradients`


def train_step(
    model: nn.Module,
    micro_batches: MicroBatches,
    optimizer: Optimizer,
    balancers: Balancers,
    expert_biases: Sequence[Tensor],
    *,
    max_norm: float,
    qk_clip: float = 0.0,
    step: int = 0,
    progress: float = 0.0,
    balancer_states: States | None = None,
    measure_experts: bool = False,
    gradient_moments: GradientMoments | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    gradients: Gradients | None = None,
) -> StepOutput:
    """Update the model once from all micro-batches of tokens and labels (B, S) that this rank holds.

    `expert_biases` are the selection biases (E,) of the MoE layers, in order, or empty, and `balancer_states` what the
    model has of balancers that keep any. Every returned number is over all ranks and micro-batches. The loss is a sum
    divided by the global number of tokens of the step, so gradients do not depend on how the step is cut into ranks and
    micro-batches. `step` is its number, from 1, and `progress` the part of the run that is done with it. With
    `measure_experts` the output has `expert_stats`, at the cost of a copy of this rank's experts during the step. Where
    the optimizer keeps no moments of Adam's, their gradient_snr is of `gradient_moments`: an empty dictionary that is
    given to every step, and comes to hold as much as this rank's experts. With `qk_clip` above 0 heads of attention are
    clipped to it (`clip_heads`). `sequence_group` are the ranks that hold parts of the same sequences, where a rank has
    not all of them. `gradients` is `compute_gradients` (None) or does the same. A step with a loss, gradient norm or
    router logit that is NaN or infinite is `skipped`: weights, optimizer states, selection biases and what balancers
    keep stay as they are.
    """
    gradients = gradients or compute_gradients
    sums, num_tokens, max_logits = gradients(
        model, micro_batches, balancers, expert_biases, with_max_logits=qk_clip > 0, sequence_group=sequence_group
    )
    sums = all_reduce_sums(sums)  # the ranks meet here: from now on every number is the same on all of them

    # The norm is of all gradients, so a NaN or an infinity in any of them shows in it.
    squares = grad_squares(model.named_parameters())
    grad_norm = squares.norm()
    finite = is_finite(sums["total_loss"], grad_norm, sums.get("nonfinite"))

    # What the update did to each expert shows only beside the weights of before.
    looks = measure_experts or gradient_moments is not None
    experts = expert_parameters(model.named_parameters()) if looks else {}
    before = copies(experts) if measure_experts else []
    if gradient_moments is not None:
        grad_scale = clip_scale(grad_norm, max_norm)
        observe_gradients(experts, optimizer, gradient_moments, finite, sums["load"], grad_scale)
    load_factors = optimizer.step(load=sums["load"], grad_norm=grad_norm, max_norm=max_norm, finite=finite)
    optimizer.zero_grad()

    # The only writes to model state outside the optimizer.
    clipped = clip_heads(model, max_logits, qk_clip, finite) if qk_clip else None
    update_balancers(balancers, expert_biases, sums, balancer_states, step=step, progress=progress, finite=finite)
    project_routers(balancers, model, finite)
    return StepOutput(
        loss=sums["loss"],
        balance_losses={name: sums[f"balance/{name}"] for name, (_, b) in balancers.items() if b.has_loss},
        total_loss=sums["total_loss"],
        grad_norm=grad_norm,
        load=sums["load"],
        num_tokens=num_tokens,
        routing_means=routing_means(sums),
        load_factors=load_factors,
        group_factors=optimizer.load_factors(finite),
        expert_stats=global_expert_stats(experts, before, optimizer, gradient_moments) if before else None,
        nonfinite=sums.get("nonfinite"),
        skipped=~finite,
        nonfinite_gradients=squares.nonfinite,
        qk_clip=clipped,
    )


def compute_gradients(
    model: nn.Module,
    micro_batches: MicroBatches,
    balancers: Balancers,
    expert_biases: Sequence[Tensor],
    *,
    with_max_logits: bool = False,
    sequence_group: dist.ProcessGroup | None = None,
) -> tuple[Sums, Tensor, list[Tensor]]:
    """Add the gradients of all micro-batches to the parameters'; arguments are as those of `train_step`.

    Return what adds up over micro-batches and over ranks, of this rank; the number of the step's tokens, of all ranks;
    and the heads' largest logits (N, H) of each micro-batch, where they are wanted.
    """
    # The loss is divided by the tokens of the whole step, which the first backward has to know already.
    num_tokens = all_reduce_sum(sum_tensors([(labels != IGNORE).sum() for _, labels in micro_batches]))
    num_routed = routed_tokens(micro_batches, like=num_tokens)
    count_loads = load_counter(balancers, model, micro_batches, sequence_group)
    sums: Sums = {}
    max_logits: list[Tensor] = []  # (N, H) of each micro-batch, for QK-clip alone
    for number, (tokens, labels) in enumerate(micro_batches, start=1):
        # Replicas need the sum of their gradients once a step: all but the last backward leave it out.
        set_last_micro_batch(model, number == len(micro_batches))

        # No state is written in forward: balance is a function of the routings that the model returns.
        ce_sum, routings, largest = forward(model, tokens, labels, want_max_logits=with_max_logits)
        max_logits += largest
        ce = ce_sum / num_tokens
        balance = balance_losses(balancers, routings, count_loads(routings, len(tokens)), num_routed)

        # Reported at coefficient 1, so that runs can be compared whatever their coefficients; trained on with them.
        trained = [coeff * balance[name] for name, (coeff, b) in balancers.items() if name in balance and b.train]
        loss = sum_tensors([ce, *trained])
        loss.backward()
        routed = routed_sums(routings, balancers, expert_biases, balance, device=tokens.device)
        sums = add(sums, {"total_loss": loss, "loss": ce, **routed})
    return sums, num_tokens, max_logits


def routed_tokens(micro_batches: MicroBatches, *, like: Tensor) -> Tensor:
    """The tokens of the step that experts get, of all ranks: those without a label, too; a scalar as `like`."""
    # All ranks have tokens of one shape. The number is written on the device, and the host does not wait for it.
    return like.new_full((), world_size() * sum(tokens.numel() for tokens, _ in micro_batches))


def forward(
    model: nn.Module, tokens: Tensor, labels: Tensor, *, want_max_logits: bool
) -> tuple[Tensor, tuple[Routing, ...], list[Tensor]]:
    """The summed cross-entropy, the routings, and the heads' largest logits (N, H), in a list, empty if not wanted."""
    if not want_max_logits:
        return *model(tokens, labels), []
    output, routings = model(tokens, labels, want="loss_and_max_logits")
    return output.ce_sum, routings, [output.max_logits]


@torch.no_grad()
def eval_step(model: nn.Module, tokens: Tensor, labels: Tensor, token_bytes: Tensor) -> EvalOutput:
    """Sums over one validation batch (B, S) of this rank; a batch whose labels are all ignored counts nothing.

    `token_bytes` (V,) is the number of UTF-8 bytes of each token.
    """
    score, routings = model(tokens, labels, want="score")
    counts = labels != IGNORE  # (B, S)

    # A batch is real or a dummy that only keeps this rank in step with the others: its tokens are routed all the same.
    is_real = counts.any()
    loads = split_loads(routings, device=tokens.device)
    return EvalOutput(
        loss_sum=score.ce_sum.double(),
        num_correct=score.num_correct,
        num_tokens=counts.sum(),
        num_routed=is_real * counts.numel(),
        num_bytes=(token_bytes[labels.clamp(min=0)] * counts).sum(),
        load=loads["load"] * is_real,
        identity_load=loads["identity_load"] * is_real,
        scores_sum=stack([r.scores.sum(0) for r in routings], score.ce_sum) * is_real,
        z_loss_sum=stack([token_z_loss(r).sum() for r in routings], score.ce_sum) * is_real,
        entropy_sum=stack([token_entropy(r).sum() for r in routings], score.ce_sum) * is_real,
    )


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> EvalOutput:
    """Sums over all validation batches of all ranks, each of which must have the same number of batches."""
    sums: Sums = {}
    for tokens, labels in batches:
        sums = add(sums, eval_step(model, tokens, labels, token_bytes)._asdict())
    reshard(model)
    return EvalOutput(**all_reduce_sums(sums))


def load_counter(
    balancers: Balancers, model: nn.Module, micro_batches: MicroBatches, sequence_group: dist.ProcessGroup | None
) -> Callable[[Sequence[Routing], int], Loads]:
    """Make the function that gives the loads of the scopes in use, for one micro-batch after the other.

    It takes the micro-batch's routings and its number of sequences; all ranks call it alike.
    """
    # Each scope costs collectives, or a pass over all micro-batches, so only those are counted that a loss asks for.
    scopes = {scope for _, balancer in balancers.values() for scope in balancer.scopes}
    whole_LE = route_ahead(model, micro_batches) if "global_batch_exact" in scopes else None
    so_far: list[Tensor] = []  # (L, E) of each micro-batch, over all ranks

    def of_whole_sequences(loads: list[Tensor]) -> Sequence[Tensor]:
        """Ranks that have parts of the same sequences count as one, so that the layout does not matter."""
        return loads if sequence_group is None else all_reduce_sum(torch.stack(loads), sequence_group).unbind()

    @torch.no_grad()
    def count_loads(routings: Sequence[Routing], sequences: int) -> Loads:
        # Of this micro-batch alone: (E,) of each layer, or (B, E) where each sequence is to be balanced for itself.
        loads: dict[Scope, Sequence[Tensor]] = {}
        if "micro_batch" in scopes:
            loads["micro_batch"] = of_whole_sequences([r.tokens_per_expert for r in routings])  # (E,)
        if "sequence" in scopes:
            loads["sequence"] = of_whole_sequences([sequence_load(r, sequences) for r in routings])  # (B, E)

        # Of the whole step, (E,) of each layer: all that has been routed so far, as later micro-batches are not known.
        # The exact load is that of the pass ahead.
        if "global_batch" in scopes:
            so_far.append(all_reduce_sum(torch.stack([r.tokens_per_expert for r in routings])))
            loads["global_batch"] = sum_tensors(so_far).unbind()
        if whole_LE is not None:
            loads["global_batch_exact"] = whole_LE.unbind()
        return loads

    return count_loads


@torch.no_grad()
def route_ahead(model: nn.Module, micro_batches: MicroBatches) -> Tensor:
    """The load (L, E) of the whole step, all ranks, by a forward pass over all micro-batches before the real ones."""
    loads = [stack_loads(model(tokens, want="routings")[1], device=tokens.device) for tokens, _ in micro_batches]
    return all_reduce_sum(sum_tensors(loads))


def sequence_load(routing: Routing, sequences: int) -> Tensor:
    """Tokens per expert of each sequence, (B, E) int64, of a micro-batch of B sequences."""
    ids_BN = routing.topk_experts.view(sequences, -1)
    E = routing.scores.shape[-1]
    counts_BE = ids_BN.new_zeros(sequences, E + 1)  # the last of slots without an expert
    return counts_BE.scatter_add_(1, ids_BN, torch.ones_like(ids_BN))[:, :E]


def balance_losses(balancers: Balancers, routings: Sequence[Routing], loads: Loads, num_tokens: Tensor) -> Sums:
    """Each balancer's loss at coefficient 1, mean over layers, as this micro-batch's share of the step; fp32.

    `num_tokens` are those that are routed in the step, on all ranks.
    """
    losses = {}
    for name, (_, balancer) in balancers.items():
        if balancer.has_loss:
            with torch.set_grad_enabled(balancer.train):
                of_layer = [{scope: loads[scope][i] for scope in balancer.scopes} for i in range(len(routings))]
                shares = [balancer.loss_of(routings, i, of, num_tokens, name) for i, of in enumerate(of_layer)]
                losses[name] = (sum_tensors(shares) / len(routings)).float()
    return losses


@torch.no_grad()
def observations(balancers: Balancers, routings: Sequence[Routing], expert_biases: Sequence[Tensor]) -> Sums:
    """What the balancers' post steps want to know of this micro-batch beside its load, stacked over layers."""
    return {
        f"observed/{name}": torch.stack([b.observe(r, bias) for r, bias in zip(routings, expert_biases, strict=True)])
        for name, (_, b) in balancers.items()
        if b.observe is not None
    }


@torch.no_grad()
def update_balancers(
    balancers: Balancers,
    expert_biases: Sequence[Tensor],
    sums: Sums,
    states: States | None = None,
    *,
    step: int = 0,
    progress: float = 0.0,
    finite: Tensor | None = None,
) -> None:
    """Apply the balancers' post steps to the selection biases (E,) of all layers and to the `states`, in place.

    `sums`, of all ranks, has the `split_loads` and the `observations`. Where `finite`, a bool scalar, is false, nothing
    changes.
    """
    post_steps = {name: balancer for name, (_, balancer) in balancers.items() if balancer.moves_bias}
    if not post_steps:
        return

    # The router's load, of the experts that have weights and of those that have none.
    identity_load = sums.get("identity_load", sums["load"][..., :0])
    router_load, num_identity_experts = torch.cat([sums["load"], identity_load], dim=-1), identity_load.shape[-1]

    # All layers at once, and one after the other where several balancers move the bias.
    bias_LE = before_LE = torch.stack(list(expert_biases))
    changes: list[tuple[Sequence[Tensor], Tensor, Tensor]] = []  # tensors of the layers, stacked, as they become
    for name, balancer in post_steps.items():
        tensors = (states or {})[name] if balancer.init else {}
        before = {key: torch.stack(list(layers)) for key, layers in tensors.items()}  # (L, ...) each
        load = sums.get(f"observed/{name}", router_load)
        offered = {"step": step, "progress": progress, "num_identity_experts": num_identity_experts}
        bias_LE, after = balancer.after_step(load, bias_LE, before, **offered)
        changes += [(layers, before[key], after[key]) for key, layers in tensors.items()]
    changes.append((expert_biases, before_LE, bias_LE))

    # The flag stays on the device, where a branch would make the host wait for it.
    if finite is not None:
        changes = [(layers, old, torch.where(finite, new, old)) for layers, old, new in changes]
    targets = [tensor for layers, _, _ in changes for tensor in layers]
    torch._foreach_copy_(targets, [tensor for _, _, new in changes for tensor in new.unbind()])


@torch.no_grad()
def project_routers(balancers: Balancers, model: Any, finite: Tensor) -> None:
    """Apply the balancers' projections to the weights of every layer's router, in place, unless `finite` is false."""
    projections = [balancer.project for _, balancer in balancers.values() if balancer.project is not None]
    for layer in model.moe_layers() if projections else ():
        parameters = dict(layer.router.named_parameters())
        weights: Mapping[str, Tensor] = {name: gathered(p).float() for name, p in parameters.items()}
        for project in projections:
            weights = project(weights)

        # Every rank has computed the whole, and keeps its part.
        for name, parameter in parameters.items():
            part = local(parameter)
            part.copy_(torch.where(finite, own_part(weights[name], parameter), part))


@torch.no_grad()
def clip_heads(model: Any, max_logits: Sequence[Tensor], threshold: float, finite: Tensor) -> QKClip:
    """QK-clip: scale down, in place, what makes the logits of each head whose largest is above `threshold` in the step.

    `max_logits` (N, H) are those of the weights before the step, of each micro-batch of this rank. With gamma =
    threshold / largest, the rows of the head in wq and wk are multiplied by sqrt(gamma); where heads share a key head,
    those in wq alone by gamma, because the logits of others are to stay. Where `finite`, a bool scalar, is false,
    nothing changes. Source: Kimi K2 (2025, arXiv 2507.20534), section 2.1, which treats the shared part of a key so.
    """
    # A head that is not clipped is multiplied by 1: the host does not know which are, and does not wait to learn it.
    largest_NH = all_reduce_max(torch.stack(list(max_logits)).amax(0))
    is_clipped_NH = (largest_NH > threshold) & finite
    gamma_NH = torch.where(is_clipped_NH, threshold / largest_NH, 1.0)
    for attention, gamma_H in zip(model.attention_layers(), gamma_NH, strict=True):
        scaled, factor_H = [attention.wq, attention.wk], gamma_H.sqrt()
        if attention.grouped:
            scaled, factor_H = [attention.wq], gamma_H

        # Each rank scales the rows that it has, whole heads or not.
        factor_O = factor_H.repeat_interleave(attention.head_dim)  # (H,) -> (H C,)
        for linear in scaled:
            part = local(linear.weight)
            part.copy_(part * factor_O[local_rows(linear.weight)].unsqueeze(-1))
            if linear.bias is not None:
                part = local(linear.bias)
                part.copy_(part * factor_O[local_rows(linear.bias)])
    return QKClip(largest_NH, is_clipped_NH.sum())


def is_finite(total_loss: Tensor, grad_norm: Tensor, nonfinite_L: Tensor | None) -> Tensor:
    """Whether a step may change anything, a bool scalar that stays on the device; alike on all ranks.

    `nonfinite_L` is above 0 in layers with a router logit that is NaN or infinite: the choices there mean nothing.
    """
    finite = total_loss.isfinite() & grad_norm.isfinite()
    return finite if nonfinite_L is None else finite & (nonfinite_L == 0).all()


def global_expert_stats(
    experts: Mapping[nn.Parameter, int],
    before: Sequence[Tensor],
    optimizer: Optimizer,
    moments: GradientMoments | None,
) -> ExpertStats:
    """What the step was to each expert, over all ranks; `before` are their parameters of before."""
    return expert_stats(all_reduce_sum(expert_sums(experts, before, optimizer, moments)))


def routed_sums(
    routings: Sequence[Routing],
    balancers: Balancers,
    expert_biases: Sequence[Tensor],
    balance: Sums,
    *,
    device: torch.device,
) -> Sums:
    """All that adds up of a micro-batch's routings: balance losses, means, observations and loads."""
    # Users choose the names of balancers, so that theirs get a prefix: one may be called as any other entry.
    return {
        **{f"balance/{name}": value for name, value in balance.items()},
        **routing_sums(routings),
        **observations(balancers, routings, expert_biases),
        **split_loads(routings, device=device),
    }


@torch.no_grad()
def routing_sums(routings: Sequence[Routing]) -> Sums:
    """Sums over this micro-batch's tokens, fp32, (L,) each: what `routing_means` makes means of.

    Of router logits the 2-norms; of scores the largest; a flag, above 0 where a logit is NaN or infinite; and where
    choices can be lost, how many were, and how many tokens no expert computes; where slots may stay unused, how many
    choices are computed. Nothing for a dense model.
    """
    # Sums and not means, as they add up over micro-batches and ranks. The flag is a sum as well: a single NaN shows.
    if not routings:
        return {}
    logit_norm_L = torch.stack([torch.linalg.vector_norm(r.router_logits, dim=-1).sum() for r in routings])
    sums = {
        "router_logit_norm": logit_norm_L,
        "router_confidence": torch.stack([r.scores.amax(-1).sum() for r in routings]),
        "tokens": routings[0].scores.new_full((), float(routings[0].scores.shape[0])),  # every layer has all of them
        "nonfinite": (~logit_norm_L.isfinite()).float(),  # as is the norm of such a logit, and of one above 1e19
    }

    # Counts become fp32 to travel with the other sums: exact up to 2^24.
    limited = [(r, r.kept) for r in routings if r.kept is not None]
    if limited:
        dropped = [((r.topk_experts < r.scores.shape[-1]) & ~is_kept).sum() for r, is_kept in limited]
        sums["dropped"] = torch.stack(dropped).float()
        sums["unrouted"] = torch.stack([(~is_kept.any(-1)).sum() for _, is_kept in limited]).float()
    if any(r.has_unused for r in routings):
        computed = [computed_choices(r) for r in routings]
        sums["experts"] = torch.stack([choices.sum() for choices in computed if choices is not None]).float()
    return sums


def routing_means(sums: Sums) -> dict[str, Tensor]:
    """Means over the step's tokens, (L,) each, by their names in metrics.jsonl; none for a dense model."""
    if "tokens" not in sums:
        return {}
    means = {name: sums[name] / sums["tokens"] for name in ("router_logit_norm", "router_confidence")}
    if "dropped" in sums:
        choices_L = sums["load"].sum(-1) + sums["identity_load"].sum(-1)
        means["dropped_fraction"] = sums["dropped"] / choices_L.clamp(min=1)  # no token may have an expert
        means["unrouted_fraction"] = sums["unrouted"] / sums["tokens"]
    means |= identity_means(sums["load"], sums["identity_load"], sums["tokens"])
    if "experts" in sums:
        means["experts_per_token"] = sums["experts"] / sums["tokens"]
    return means


def stack_loads(routings: Sequence[Routing], *, device: torch.device) -> Tensor:
    """Tokens per expert of all layers, (L, E) int64; (0,) for a dense model."""
    if not routings:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([r.tokens_per_expert for r in routings])


def split_loads(routings: Sequence[Routing], *, device: torch.device) -> Sums:
    """The `load` of the experts that have weights, (L, E), and the `identity_load` of those that have none, (L, Z)."""
    load = stack_loads(routings, device=device)
    num_experts = load.shape[-1] - (routings[0].num_identity_experts if routings else 0)
    return {"load": load[..., :num_experts], "identity_load": load[..., num_experts:]}


def stack(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stack in float64; (0,) on the device of `like` where there is nothing to stack."""
    return torch.stack(list(values)).double() if values else like.new_zeros(0, dtype=torch.float64)


@torch.no_grad()
def add(sums: Sums, values: Sums) -> Sums:
    """The sum of two that have the same names, entry by entry; `sums` may be empty, and is for the first micro-batch.

    Micro-batches add up in order, so that resumed runs repeat it to the bit.
    """
    values = {name: value.detach() for name, value in values.items()}
    if not sums:
        return values

    # One kernel for each dtype, not for each name: on a GPU the host would take longer for them than the device.
    added: Sums = {}
    for names in names_by_dtype(values):
        results = torch._foreach_add([sums[name] for name in names], [values[name] for name in names])
        added |= dict(zip(names, results, strict=True))
    return added


def all_reduce_sums(sums: Sums) -> Sums:
    """Sum every entry over all ranks, with one collective for each dtype."""
    if world_size() == 1:
        return sums
    reduced: Sums = {}
    for names in names_by_dtype(sums):
        flat = all_reduce_sum(torch.cat([sums[name].flatten() for name in names]))
        parts = flat.split([sums[name].numel() for name in names])
        reduced |= {name: part.view_as(sums[name]) for name, part in zip(names, parts, strict=True)}
    return reduced


def names_by_dtype(sums: Sums) -> list[list[str]]:
    """The names of the entries of each dtype, in the order of their first."""
    names: dict[torch.dtype, list[str]] = {}
    for name, value in sums.items():
        names.setdefault(value.dtype, []).append(name)
    return list(names.values())


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Sum a non-empty sequence, first to last (a fixed order: resumed runs must repeat it to the bit)."""
    return sum(tensors[1:], start=tensors[0])
