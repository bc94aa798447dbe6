"""One training step and one evaluation step: read from here.

Shapes: B sequences, S positions, V vocabulary, L MoE layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.balancer import Balancer, keep_bias, no_loss, token_entropy, token_z_loss
from titan_moe.metrics import EvalOutput, StepOutput
from titan_moe.model.routing import Routing
from titan_moe.optimizer.load_lr import step_by_load
from titan_moe.parallelize.grad import clip_grad_norm

IGNORE = -100  # a label that does not count, torch's convention

# Each balancer at coefficient 1, with its coefficient beside it: values are reported before their coefficients.
Balancers = Mapping[str, tuple[float, Balancer]]


def train_step(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    balancers: Balancers,
    expert_biases: Sequence[Tensor],
    *,
    max_norm: float,
) -> StepOutput:
    """Update the model once from all micro-batches of tokens and labels (B, S) that this rank holds.

    `expert_biases` are the selection biases (E,) of the MoE layers, in order, or empty. Every returned number is over
    all ranks and micro-batches. The loss is a sum divided by the global number of tokens of the step, so gradients do
    not depend on how the step is cut into ranks and micro-batches.
    """
    num_tokens = all_reduce_sum(sum_tensors([(labels != IGNORE).sum() for _, labels in micro_batches]))
    sums, loads = [], []
    for tokens, labels in micro_batches:
        logits, routings = model(tokens)
        ce = cross_entropy_sum(logits, labels) / num_tokens
        balance = balance_losses(routings, balancers, num_tokens)
        loss = sum_tensors([ce, *(balancers[name][0] * value for name, value in balance.items())])
        loss.backward()
        sums.append(torch.stack([loss.detach(), ce.detach(), *(value.detach() for value in balance.values())]))
        loads.append(stack_loads(routings))
    total_loss, ce, *values = all_reduce_sum(sum_tensors(sums)).unbind()
    load_LE = all_reduce_sum(sum_tensors(loads))  # one collective for all layers

    grad_norm = clip_grad_norm(model.parameters(), max_norm)
    load_factors = step_by_load(optimizer, load_LE)
    optimizer.zero_grad()
    update_expert_biases(expert_biases, load_LE, balancers)
    return StepOutput(
        loss=ce,
        balance_losses=dict(zip(balance, values, strict=True)),
        total_loss=total_loss,
        grad_norm=grad_norm,
        load=load_LE,
        num_tokens=num_tokens,
        load_factors=load_factors,
    )


@torch.no_grad()
def eval_step(model: nn.Module, tokens: Tensor, labels: Tensor, token_bytes: Tensor) -> EvalOutput:
    """Sums over one validation batch (B, S) of this rank; a batch whose labels are all ignored counts nothing.

    `token_bytes` (V,) is the number of UTF-8 bytes of each token.
    """
    logits, routings = model(tokens)
    counts = labels != IGNORE
    counted = counts.any()  # a batch is real or a dummy that only keeps this rank in step with the others
    return EvalOutput(
        loss_sum=cross_entropy_sum(logits, labels).double(),
        num_correct=((logits.argmax(-1) == labels) & counts).sum(),
        num_tokens=counts.sum(),
        num_bytes=(token_bytes[labels.clamp(min=0)] * counts).sum(),
        load=stack_loads(routings) * counted,
        scores_sum=stack([r.scores.sum(0) for r in routings], logits) * counted,
        z_loss_sum=stack([token_z_loss(r).sum() for r in routings], logits) * counted,
        entropy_sum=stack([token_entropy(r).sum() for r in routings], logits) * counted,
    )


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> EvalOutput:
    """Sums over all validation batches of all ranks, each of which must have the same number of batches."""
    device = token_bytes.device
    outputs = [eval_step(model, tokens.to(device), labels.to(device), token_bytes) for tokens, labels in batches]
    return EvalOutput(*(all_reduce_sum(sum_tensors(field)) for field in zip(*outputs, strict=True)))


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the labels that count, nats; logits (B, S, V), labels (B, S)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def balance_losses(routings: Sequence[Routing], balancers: Balancers, num_tokens: Tensor) -> dict[str, Tensor]:
    """Each balancer's loss at coefficient 1, mean over layers, as this micro-batch's share of the step."""
    return {
        name: sum_tensors([balancer.loss(r, r.tokens_per_expert, num_tokens) for r in routings]) / len(routings)
        for name, (_, balancer) in balancers.items()
        if balancer.loss is not no_loss
    }


@torch.no_grad()
def update_expert_biases(expert_biases: Sequence[Tensor], load_LE: Tensor, balancers: Balancers) -> None:
    """Apply the balancers' post steps: the only write to model state outside the optimizer."""
    post_steps = [balancer.post_step for _, balancer in balancers.values() if balancer.post_step is not keep_bias]
    if not post_steps:
        return
    bias_LE = torch.stack(list(expert_biases))
    for post_step in post_steps:
        bias_LE = post_step(load_LE, bias_LE)
    torch._foreach_copy_(list(expert_biases), list(bias_LE.unbind()))


def stack_loads(routings: Sequence[Routing]) -> Tensor:
    """Tokens per expert of all layers, (L, E) int64; (0,) for a dense model."""
    return torch.stack([r.tokens_per_expert for r in routings]) if routings else torch.zeros(0, dtype=torch.int64)


def stack(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stack in float64; (0,) on the device of `like` where there is nothing to stack."""
    return torch.stack(list(values)).double() if values else like.new_zeros(0, dtype=torch.float64)


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Sum a non-empty sequence, first to last (a fixed order: resumed runs must repeat it to the bit)."""
    return sum(tensors[1:], start=tensors[0])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; unchanged when there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
