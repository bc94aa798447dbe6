"""What the optimizer did to each expert in a step: gradient signal-to-noise and size of the update.

Shapes: L MoE layers, E experts, R the rows (experts) of a tensor that this rank holds.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from titan_moe.norms import norms
from titan_moe.optimizer.groups import group_of, layer_indices
from titan_moe.optimizer.transform import MOMENTS
from titan_moe.runtime.dtensor import local, local_rows


class ExpertStats(NamedTuple):
    """Measures of one optimizer step, (L, E) float64; NaN where there is nothing to measure yet."""

    gradient_snr: Tensor | None  # None where the optimizer keeps no Adam moments
    update_ratio: Tensor


def expert_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[nn.Parameter, int]:
    """Each stacked expert parameter and the index of its layer among the MoE layers."""
    experts = {name: parameter for name, parameter in named_parameters if group_of(name) == "expert"}
    return dict(zip(experts.values(), layer_indices(list(experts)), strict=True))


def copies(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of this rank's parts, to compare with after the step: 4 bytes for each fp32 parameter until then."""
    return [local(parameter).clone() for parameter in parameters]


@torch.no_grad()
def expert_sums(experts: Mapping[nn.Parameter, int], before: Iterable[Tensor], optimizer: Optimizer) -> Tensor:
    """Four sums over each expert's elements on this rank, (4, L, E) float64; add them up over ranks.

    They are the squares of the update, of the parameters before it and of Adam's first moment, and its second moment.
    Replicas of a row are counted in every sum, so that they cancel in the ratios that `expert_stats` makes.
    """
    # for all experts on every rank, with zeros for those that are elsewhere, so that ranks can add them up
    first = next(iter(experts))
    sums = torch.zeros(4, max(experts.values()) + 1, first.shape[0], dtype=torch.float64, device=first.device)

    # an expert's parameters are several tensors, whose squares add up to those of the whole expert
    for (parameter, layer), old in zip(experts.items(), before, strict=True):
        terms = [_squares(local(parameter) - old), _squares(old)]
        state = optimizer.state.get(parameter, {})  # none before the first step
        if all(name in state for name in MOMENTS):
            mean, square = (local(state[name]) for name in MOMENTS)
            terms += [_squares(mean), square.flatten(1).sum(1, dtype=torch.float64)]
        for total, term_R in zip(sums, terms, strict=False):  # (L, E), (R,)
            total[layer, local_rows(parameter)] += term_R
    return sums


def _squares(rows: Tensor) -> Tensor:
    """Sum of squares of each row, (R, ...) -> (R,) float64."""
    return norms(rows.unbind()).square() if len(rows) else rows.new_zeros(0, dtype=torch.float64)


@torch.no_grad()
def expert_stats(experts: Mapping[nn.Parameter, int], sums: Tensor, optimizer: Optimizer) -> ExpertStats:
    """Measures from the sums of all ranks.

    `update_ratio` is ||p_new - p_old|| / ||p_old||, decay included.

    `gradient_snr` is ||E g|| / sqrt(tr Var g) of the step's gradient g of an expert (the paper, section 3.4, which
    expects it to grow as the square root of the expert's batch; 1 / SNR^2 times the batch is the noise scale of
    McCandlish et al., 2018). Both are estimated from Adam's moments m, v, means over the last steps with weights that
    fall by beta1 and beta2, after bias correction: E v = |E g|^2 + tr Var g and E |m|^2 = |E g|^2 + c tr Var g, where
    c = (1 - beta1) (1 + beta1^t) / ((1 + beta1) (1 - beta1^t)) is the sum of m's squared weights after t steps. So
    SNR^2 = (|m|^2 - c v) / (v - |m|^2), 0 where noise makes that negative. It supposes that E g hardly changes over
    1 / (1 - beta1) steps, and sees gradients as the optimizer does, after clipping. The gradients of micro-batches
    would need no such supposition, but there is often one micro-batch alone, and they cost a copy each.
    """
    update, size, mean, square = sums  # (L, E) each
    ratio = (update / size).sqrt()

    # All parameters of a layer are updated together, so one of each layer tells how many steps its experts have taken.
    # There are no moments before the first step, and none of an optimizer that does not keep them.
    of_layer = {layer: parameter for parameter, layer in experts.items()}
    states = [optimizer.state.get(of_layer[layer], {}) for layer in sorted(of_layer)]
    group = next(group for group in optimizer.param_groups if any(p is of_layer[0] for p in group["params"]))
    if not all(name in state for state in states for name in (*MOMENTS, "step")) or "betas" not in group:
        return ExpertStats(None, ratio)

    # after one step m is that step's gradient, of which alone no variance can be told
    beta1, beta2 = group["betas"]
    steps = torch.stack([state["step"].to(ratio).expand(ratio.shape[1]) for state in states])  # (L, E)
    mean = mean / (1 - beta1**steps).square()
    square = square / (1 - beta2**steps)
    c = (1 - beta1) * (1 + beta1**steps) / ((1 + beta1) * (1 - beta1**steps))
    snr = ((mean - c * square).clamp(min=0) / (square - mean).clamp(min=0)).sqrt()
    return ExpertStats(torch.where((steps > 1) & snr.isfinite(), snr, torch.nan), ratio)
