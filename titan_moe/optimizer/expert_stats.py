"""What a step was to each expert: signal-to-noise of its gradient, and the size of its update; with any optimizer.

Shapes: L MoE layers, E experts, R the rows (experts) of a tensor that this rank holds.
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
from titan_moe.optimizer.transform import MOMENTS, State
from titan_moe.runtime.dtensor import local, local_rows

BETAS = 0.9, 0.95  # of moments of our own: AdamW's defaults

GradientMoments = dict[nn.Parameter, State]  # this rank's moments of experts whose optimizer does not keep Adam's


class ExpertStats(NamedTuple):
    """Measures of one optimizer step, (L, E) float64; NaN where there is nothing to measure yet."""

    gradient_snr: Tensor
    update_ratio: Tensor


def expert_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[nn.Parameter, int]:
    """Each stacked expert parameter and the index of its layer among the MoE layers."""
    named = {plain_name(name): parameter for name, parameter in named_parameters}
    layers = moe_layers(name for name in named if group_of(name) == "expert")
    return {named[name]: layer for name, layer in layers.items()}


def copies(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of this rank's parts, to compare with after the step: 4 bytes for each fp32 parameter until then."""
    return [local(parameter).clone() for parameter in parameters]


def keeps_adams(parameter: Tensor, group: Group, state: State) -> bool:
    """Whether states of Adam's names are there and have the parameter's shape; they are then taken to be Adam's."""
    return (
        "betas" in group
        and "step" in state
        and all(name in state and state[name].shape == parameter.shape for name in MOMENTS)
    )


@torch.no_grad()
def observe_gradients(
    experts: Mapping[nn.Parameter, int],
    optimizer: Optimizer,
    moments: GradientMoments,
    finite: Tensor,
    load_LE: Tensor,
    grad_scale: Tensor | None = None,
) -> None:
    """Let `moments` follow the gradients of a step that comes now, where the optimizer keeps no Adam's itself.

    Gradients are divided by `grad_scale`, as the optimizer does. What it keeps shows after its first step, so that one
    is not observed.

    Of the first moment each element is kept, of the second its sum over an expert's matrix, with the decay of `BETAS`.
    What is left as it was is what an Adam would leave: all in a step that is not `finite`, and where rates depend on
    load an expert without a token.
    """
    groups = group_by_parameter(optimizer)
    for parameter, layer in experts.items():
        group, state = groups[parameter], optimizer.state.get(parameter, {})
        if parameter.grad is None or parameter not in moments or keeps_adams(parameter, group, state):
            moments[parameter] = {}
            continue
        gradient = local(parameter.grad).float()  # (R, M, N)
        gradient = gradient if grad_scale is None else gradient / grad_scale
        if not moments[parameter]:
            zeros_R = gradient.new_zeros(len(gradient))
            first, second = torch.zeros_like(gradient), zeros_R.double().view(-1, 1, 1)
            moments[parameter] = {"step": zeros_R, **dict(zip(MOMENTS, (first, second), strict=True))}

        # by choices on the device: a NaN times a weight of 0 would stay
        moves = finite.expand(len(gradient))
        if "load_lr" in group:
            moves = moves & (load_LE[layer, local_rows(parameter)] > 0)
        squares = _squares(gradient).view(-1, 1, 1)
        for name, beta, seen in zip(MOMENTS, BETAS, (gradient, squares), strict=True):
            moment, chosen = moments[parameter][name], moves.view(-1, 1, 1)
            moment.lerp_(torch.where(chosen, seen, 0.0), (1 - beta) * chosen.to(moment.dtype))
        moments[parameter]["step"] += moves


@torch.no_grad()
def expert_sums(
    experts: Mapping[nn.Parameter, int],
    before: Iterable[Tensor],
    optimizer: Optimizer,
    moments: GradientMoments | None = None,
) -> Tensor:
    """Six sums over each expert's elements on this rank, (6, L, E) float64; add them up over ranks.

    They are the squares of the update and of the parameters before it; of Adam's moments after bias correction, the
    squares of the first, the second, and c times the second (`expert_stats`); and how many tensors have no moments of
    two steps yet. The moments are the optimizer's, or those in `moments`. Replicas of a row are counted in every sum,
    so that they cancel in the ratios that `expert_stats` makes.
    """
    # for all experts on every rank, with zeros for those that are elsewhere, so that ranks can add them up
    first = next(iter(experts))
    sums = torch.zeros(6, max(experts.values()) + 1, first.shape[0], dtype=torch.float64, device=first.device)
    groups = group_by_parameter(optimizer)

    # an expert's parameters are several tensors, whose squares add up to those of the whole expert
    for (parameter, layer), old in zip(experts.items(), before, strict=True):
        group, state = groups[parameter], optimizer.state.get(parameter, {})
        betas = group.get("betas", BETAS)
        if not keeps_adams(parameter, group, state):
            state, betas = (moments or {}).get(parameter, {}), BETAS
        terms = [_squares(local(parameter) - old), _squares(old), *_moment_terms(parameter, state, betas)]
        for total, term_R in zip(sums, terms, strict=True):  # (L, E), (R,)
            total[layer, local_rows(parameter)] += term_R
    return sums


def _moment_terms(parameter: Tensor, state: State, betas: tuple[float, float]) -> list[Tensor]:
    """Of each row (R,) float64: |m|^2, v and c v after bias correction, summed, and 1 where there is no measure yet."""
    rows = local_rows(parameter)
    none_R = torch.zeros(rows.stop - rows.start, dtype=torch.float64, device=parameter.device)
    if not state:
        return [none_R, none_R, none_R, none_R + 1]

    # SOAP's moments, in rotated coordinates, where sums of squares are the same, have not seen its first step.
    # A count is one for all, of all experts, or of this rank's rows.
    steps = local(state.get("moment_steps", state["step"])).to(none_R)
    steps = steps[rows] if steps.dim() and len(steps) != len(none_R) else steps.expand(len(none_R))
    beta1, beta2 = betas
    c = (1 - beta1) * (1 + beta1**steps) / ((1 + beta1) * (1 - beta1**steps))
    mean, square = (local(state[name]) for name in MOMENTS)
    mean = _squares(mean) / (1 - beta1**steps).square()
    square = square.flatten(1).sum(1, dtype=torch.float64) / (1 - beta2**steps)

    # after one step m is that step's gradient, of which alone no variance can be told
    early = steps <= 1
    return [*(torch.where(early, 0.0, term) for term in (mean, square, c * square)), early.double()]


def group_by_parameter(optimizer: Optimizer) -> dict[Tensor, Group]:
    """The group of each parameter."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def _squares(rows: Tensor) -> Tensor:
    """Sum of squares of each row, (R, ...) -> (R,) float64."""
    return norms(rows.unbind()).square() if len(rows) else rows.new_zeros(0, dtype=torch.float64)


def expert_stats(sums: Tensor) -> ExpertStats:
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

    Whose moments they are changes the window, not the meaning: those of an optimizer that keeps both (AdamW, Shampoo
    with AdamW's grafting, SOAP, torch's Adam), with its betas, and of any other those that `observe_gradients` keeps.
    """
    update, size, mean, square, noise, missing = sums  # (L, E) each
    snr = ((mean - noise).clamp(min=0) / (square - mean).clamp(min=0)).sqrt()
    return ExpertStats(torch.where((missing == 0) & snr.isfinite(), snr, torch.nan), (update / size).sqrt())
