"""What a step and an evaluation leave behind, and pure measures of it.

Shapes: L MoE layers, E experts that have weights, Z identity experts. A load is a number of tokens per expert, over all
ranks and micro-batches.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.optimizer.expert_stats import ExpertStats
from titan_moe.optimizer.groups import group_of

NOT_PER_LAYER = ("dropped_fraction", "unrouted_fraction")  # routing means that are recorded as means over layers alone
_TINY = 1e-300  # what a mean load of 0 is taken for in a denominator


class QKClip(NamedTuple):
    """The largest attention logits of a step, and how many heads were clipped for theirs."""

    max_logits: Tensor  # (N, H) fp32: of each query head of all N layers
    clipped_heads: Tensor  # scalar int64, over all layers


class StepOutput(NamedTuple):
    """One optimizer step: tensors on the device, global over ranks and micro-batches."""

    loss: Tensor  # scalar, cross-entropy, nats per token
    balance_losses: dict[str, Tensor]  # scalars before their coefficients, mean over layers
    total_loss: Tensor  # scalar, what was differentiated
    grad_norm: Tensor  # scalar, before clipping
    load: Tensor  # (L, E) int64, of the experts that have weights
    num_tokens: Tensor  # scalar int64
    routing_means: dict[str, Tensor]  # (L,) each, by name: means over tokens; none for a dense model
    load_factors: Tensor | None = None  # (L, E) of the experts' learning rates, None where loads do not set them
    group_factors: Mapping[str, Tensor] = {}  # of each group whose rates loads set, (l, E): l layers have part in it
    expert_stats: ExpertStats | None = None  # where the step was asked to measure its experts
    nonfinite: Tensor | None = None  # (L,), above 0 where a router logit was NaN or infinite
    skipped: Tensor | None = None  # scalar bool: a number was NaN or infinite, and the step changed nothing
    nonfinite_gradients: Callable[[], list[str]] | None = None  # names of the parameters; waits for the device
    qk_clip: QKClip | None = None  # where heads of attention are clipped


class EvalOutput(NamedTuple):
    """Sums over the tokens of some validation batches; they add up over batches and ranks."""

    loss_sum: Tensor  # scalar float64, nats
    num_correct: Tensor  # scalar: labels that were the most probable token
    num_tokens: Tensor  # scalar: labels that count
    num_routed: Tensor  # scalar: tokens that were routed, those without a label included
    num_bytes: Tensor  # scalar: UTF-8 bytes these labels stand for
    load: Tensor  # (L, E)
    identity_load: Tensor  # (L, Z): of the identity experts
    scores_sum: Tensor  # (L, E + Z): routing probabilities
    z_loss_sum: Tensor  # (L,)
    entropy_sum: Tensor  # (L,)


def maxvio(load: Tensor) -> Tensor:
    """Maximal violation of balance: max_i (L_i - mean L) / mean L (the paper, 3.3.4), (..., E) -> (...).

    0 at uniform load, E - 1 when one expert takes everything, 0 when nothing was routed.
    """
    load = load.to(torch.float64)
    mean = load.mean(-1)
    return torch.where(mean > 0, load.amax(-1) / mean - 1, 0.0)


def minvio(load: Tensor) -> Tensor:
    """Minimal violation of balance: min_i (L_i - mean L) / mean L, (..., E) -> (...).

    0 at uniform load, -1 when an expert got nothing, 0 when nothing was routed. As in VeOmni's monitor.
    """
    load = load.to(torch.float64)
    mean = load.mean(-1)
    return torch.where(mean > 0, load.amin(-1) / mean - 1, 0.0)


def avgvio(load: Tensor) -> Tensor:
    """Average violation of balance: mean_i |L_i - mean L| / mean L, (..., E) -> (...); 0 when nothing was routed.

    Half of it is the part of the assignments that another expert would have to take for a uniform load.
    """
    load = load.to(torch.float64)
    mean = load.mean(-1, keepdim=True)
    return (load - mean).abs().mean(-1) / mean.squeeze(-1).clamp(min=_TINY)


def load_cv(load: Tensor) -> Tensor:
    """Coefficient of variation: standard deviation over experts (of all E, not E - 1) / mean, (..., E) -> (...).

    0 at uniform load, sqrt(E - 1) when one expert takes everything, 0 when nothing was routed. Its square is the
    importance loss of Shazeer et al. (2017), section 4, of loads.
    """
    load = load.to(torch.float64)
    return load.std(-1, correction=0) / load.mean(-1).clamp(min=_TINY)


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the load's distribution over experts divided by log E: 1 at uniform load, (..., E) -> (...)."""
    load = load.to(torch.float64)
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1) / math.log(max(2, load.shape[-1]))


def dead_experts(load: Tensor) -> Tensor:
    """Count the experts without a token, over all layers: (..., E) -> scalar."""
    return (load == 0).sum()


def train_metrics(output: StepOutput) -> dict[str, Tensor]:
    """Scalar tensors by the names of metrics.jsonl for one optimizer step."""
    # Balance losses are before their coefficients, so that runs with different ones can be compared.
    metrics = {
        "loss": output.loss,
        **output.balance_losses,
        "total_loss": output.total_loss,
        "grad_norm": output.grad_norm,
    }

    # A dense model has neither loads nor routings.
    if output.load.numel():
        metrics |= load_metrics(output.load)
    for name, mean_L in output.routing_means.items():
        metrics |= {name: mean_L.mean()} if name in NOT_PER_LAYER else per_layer(name, mean_L)

    # An outlier is what this is about, so that of all layers the largest counts, not their mean.
    if output.qk_clip is not None:
        largest_N = output.qk_clip.max_logits.amax(-1)  # (N, H) -> (N,)
        metrics |= per_layer("max_attention_logit", largest_N) | {"max_attention_logit": largest_N.amax()}
        metrics["clipped_heads"] = output.qk_clip.clipped_heads
    return metrics


def load_metrics(load: Tensor) -> dict[str, Tensor]:
    """Scalar tensors by the names of metrics.jsonl for the load (L, E) of one optimizer step."""
    return {
        **per_layer("maxvio_batch", maxvio(load)),
        "minvio_batch": minvio(load).mean(),
        "avgvio_batch": avgvio(load).mean(),
        "load_cv": load_cv(load).mean(),
        "load_entropy": load_entropy(load).mean(),
        "dead_experts": dead_experts(load),
        "expert_batch_mean": load.to(torch.float64).mean(),
        "expert_batch_min": load.amin(),
    }


def expert_metrics(output: StepOutput) -> dict[str, Tensor]:
    """The measures of each expert, by name: mean over all and of each layer, and (L, E) as `NAME/experts`.

    The experts' loads of the step are with them, to see both side by side. Experts that have no measure do not count.
    """
    if output.expert_stats is None:
        return {}
    metrics = {"load/experts": output.load}
    for name, values_LE in output.expert_stats._asdict().items():
        means_L = {f"{name}/layer_{i}": mean for i, mean in enumerate(values_LE.nanmean(-1))}
        metrics |= {name: values_LE.nanmean(), **means_L, f"{name}/experts": values_LE}
    return metrics


def expert_lr_range(lrs: Mapping[str, float], group_factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Smallest and largest learning rate that the experts of each group had in a step, 0 for those without a token.

    `group_factors` (l, E) are by group, of those whose rates depend on load, and `lrs` the scheduled rates.
    """
    ranges = {}
    for group, factor_lE in group_factors.items():
        smallest, largest = factor_lE.to(torch.float64).aminmax()
        ranges |= {f"lr/{group}_min": lrs[group] * smallest, f"lr/{group}_max": lrs[group] * largest}
    return ranges


def eval_metrics(output: EvalOutput) -> dict[str, Tensor]:
    """Scalar tensors by the names of metrics.jsonl for a whole evaluation.

    The three routing losses are of the whole validation set at once, so they don't depend on how it was batched.
    """
    # Sums over all batches and ranks become means only here: a mean of means would depend on how batches were cut.
    T = output.num_tokens.to(torch.float64)
    loss = output.loss_sum / T
    metrics = {"loss": loss, "perplexity": loss.exp(), "accuracy": output.num_correct / T}
    metrics["num_tokens"] = output.num_tokens
    metrics["bits_per_byte"] = output.loss_sum / math.log(2) / output.num_bytes

    # The losses' formulas with load and probabilities of the whole set; a dense model has neither. Experts get padding,
    # too.
    T = output.num_routed.to(torch.float64)
    if output.load.numel():
        load_of_all = torch.cat([output.load, output.identity_load], dim=-1)
        metrics["aux_loss"] = (load_of_all / T * output.scores_sum / T).sum(-1).mean()
        metrics["z_loss"] = (output.z_loss_sum / T).mean()
        metrics["entropy_loss"] = (output.entropy_sum / T).mean()
        metrics |= per_layer("maxvio_global", maxvio(output.load))
        for name, mean_L in identity_means(output.load, output.identity_load, T).items():
            metrics |= per_layer(name, mean_L)
    return metrics


def identity_means(load: Tensor, identity_load: Tensor, num_tokens: Tensor) -> dict[str, Tensor]:
    """How much of the routing costs nothing, (L,) each by its name in metrics.jsonl; none without identity experts."""
    if identity_load.shape[-1] == 0:
        return {}
    computed, free = (one.sum(-1).to(torch.float64) for one in (load, identity_load))  # (L, E), (L, Z) -> (L,)
    return {"identity_fraction": free / (computed + free).clamp(min=_TINY), "experts_per_token": computed / num_tokens}


def per_layer(name: str, values_L: Tensor) -> dict[str, Tensor]:
    """Mean over layers under `name`, and each layer under `name/layer_I`."""
    return {name: values_L.mean(), **{f"{name}/layer_{i}": v for i, v in enumerate(values_L.unbind())}}


def to_numbers(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Replace scalar tensors by Python numbers with one copy from the device, and put other tensors on the host.

    Numbers pass through float64, so float32 values and counts below 2^53 are exact; integer tensors give int.
    """
    # A copy from a GPU waits for it, so all scalars of all records share one.
    scalars: dict[torch.dtype, dict[tuple[int, str], Tensor]] = {}  # of each dtype, by number of the record and key
    for place, record in enumerate(records):
        for key, value in record.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                scalars.setdefault(value.dtype, {})[place, key] = value.detach()

    # Those of a dtype are stacked before they are converted: a kernel for each of them would take longer than a step.
    stacked = [torch.stack(list(values.values())).to(torch.float64) for values in scalars.values()]
    numbers = torch.cat(stacked).tolist() if stacked else []
    names = [name for values in scalars.values() for name in values]
    number_of = dict(zip(names, numbers, strict=True))

    # Back to their records. A count passed through float64 and is a whole number again.
    def on_host(place: int, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > 0:
            return value.cpu()
        number = number_of[place, key]
        return number if value.is_floating_point() else int(number)

    return [{key: on_host(i, key, value) for key, value in record.items()} for i, record in enumerate(records)]


def active_parameters(named_parameters: Iterable[tuple[str, Tensor]], num_experts: int, top_k: int) -> int:
    """Parameters that take part in a token's forward pass: all but the experts it does not visit.

    `num_experts` counts identity experts, which have none: it is the mean over tokens where all are chosen alike.
    """
    return sum(
        p.numel() * top_k // num_experts if group_of(name) == "expert" else p.numel() for name, p in named_parameters
    )


def flops_per_token(active_parameters: int, *, num_layers: int, attention_dim: int, seq_len: int) -> float:
    """Training FLOPs of a token: 6 per active parameter plus 6 * L * H * C * seq_len for causal attention's products.

    As PaLM's appendix B counts them (12 * L * dim * seq_len), with the half that a causal mask leaves. The embedding
    look-up is no product: with an untied embedding leave its parameters out.
    """
    return 6.0 * active_parameters + 6.0 * num_layers * attention_dim * seq_len
