"""What the optimizer did to each expert in a step: gradient signal-to-noise and size of the update.

Shapes: L MoE layers, E experts, R the rows (experts) of a tensor that this rank holds, K groups with moments of them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from titan_moe.model.wrappers import plain_name
from titan_moe.norms import norms
from titan_moe.optimizer.groups import group_of, moe_layers
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.transform import MOMENTS
from titan_moe.runtime.dtensor import local, local_rows


class ExpertStats(NamedTuple):
    """Measures of one optimizer step, (L, E) float64; NaN where there is nothing to measure yet."""

    gradient_snr: Tensor | None  # of the matrices of which Adam's moments are kept; None where that are none
    update_ratio: Tensor


def expert_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[nn.Parameter, int]:
    """Each stacked expert parameter and the index of its layer among the MoE layers."""
    named = {plain_name(name): parameter for name, parameter in named_parameters}
    layers = moe_layers(name for name in named if group_of(name) == "expert")
    return {named[name]: layer for name, layer in layers.items()}


def with_moments(experts: Mapping[nn.Parameter, int], optimizer: Optimizer) -> list[tuple[Group, list[nn.Parameter]]]:
    """The groups of experts' parameters of which the optimizer keeps Adam's moments, with these parameters."""
    pairs = []
    for group in optimizer.param_groups:
        with_both = [
            p for p in group["params"] if p in experts and {*MOMENTS, "step"} <= optimizer.state.get(p, {}).keys()
        ]
        if with_both and "betas" in group:
            pairs.append((group, with_both))
    return pairs


def copies(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of this rank's parts, to compare with after the step: 4 bytes for each fp32 parameter until then."""
    return [local(parameter).clone() for parameter in parameters]


@torch.no_grad()
def expert_sums(experts: Mapping[nn.Parameter, int], before: Iterable[Tensor], optimizer: Optimizer) -> Tensor:
    """Sums over each expert's elements on this rank, (2 + 2 K, L, E) float64; add them up over ranks.

    They are the squares of the update and of the parameters before it; then, for each of K groups, the squares of
    Adam's first moment, and its second moment. Replicas of a row are counted in every sum, so that they cancel in the
    ratios that `expert_stats` makes.
    """
    # for all experts on every rank, with zeros for those that are elsewhere, so that ranks can add them up
    first = next(iter(experts))
    groups = with_moments(experts, optimizer)
    shape = 2 + 2 * len(groups), max(experts.values()) + 1, first.shape[0]
    sums = torch.zeros(shape, dtype=torch.float64, device=first.device)

    # an expert's parameters are several tensors, whose squares add up to those of the whole expert
    for (parameter, layer), old in zip(experts.items(), before, strict=True):
        rows = local_rows(parameter)
        sums[0, layer, rows] += _squares(local(parameter) - old)
        sums[1, layer, rows] += _squares(old)

    # groups apart, as each has betas of its own
    for number, (_, parameters) in enumerate(groups):
        for parameter in parameters:
            rows, layer = local_rows(parameter), experts[parameter]
            mean, square = (local(optimizer.state[parameter][name]) for name in MOMENTS)
            sums[2 + 2 * number, layer, rows] += _squares(mean)
            sums[3 + 2 * number, layer, rows] += square.flatten(1).sum(1, dtype=torch.float64)
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
    would need no such supposition, but there is often one micro-batch alone, and they cost a copy each. Of matrices
    whose optimizer keeps no such moments nothing is in it.
    """
    update, size = sums[:2]  # (L, E) each
    ratio = (update / size).sqrt()

    # there are no moments before the first step, and none of an optimizer that does not keep them
    groups = with_moments(experts, optimizer)
    if not groups:
        return ExpertStats(None, ratio)

    signal, noise, most_steps = (torch.zeros_like(ratio) for _ in range(3))  # (L, E)
    for number, (group, parameters) in enumerate(groups):
        # All parameters of a layer and a group are updated together, so one of them tells how many steps its experts
        # have taken. A layer of which the group has none adds nothing.
        of_layer = {experts[parameter]: optimizer.state[parameter]["step"] for parameter in parameters}
        one = torch.ones((), device=ratio.device)
        counts = [of_layer.get(layer, one).to(ratio).expand(ratio.shape[1]) for layer in range(len(ratio))]
        steps = torch.stack(counts)  # (L, E)

        # after one step m is that step's gradient, of which alone no variance can be told
        beta1, beta2 = group["betas"]
        mean = sums[2 + 2 * number] / (1 - beta1**steps).square()
        square = sums[3 + 2 * number] / (1 - beta2**steps)
        c = (1 - beta1) * (1 + beta1**steps) / ((1 + beta1) * (1 - beta1**steps))
        signal, noise, most_steps = signal + (mean - c * square), noise + (square - mean), most_steps.maximum(steps)
    snr = (signal.clamp(min=0) / noise.clamp(min=0)).sqrt()
    return ExpertStats(torch.where((most_steps > 1) & snr.isfinite(), snr, torch.nan), ratio)
