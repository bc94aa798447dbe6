"""Updates by a kernel, which makes the whole step of tensors of any shape in one pass over memory.

Shapes: E experts, R those of them that this rank holds, M x N the matrix of one.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.rounding import Place, is_narrow, keys_of, narrowed, step_in_fp32
from titan_moe.optimizer.transform import Kernel, State
from titan_moe.runtime.dtensor import local, local_rows, local_slices


class Scalars(NamedTuple):
    """What kernels read on the device so that the host need not wait for it: fp32 scalars, None for no effect.

    A kernel divides gradients by `grad_scale`, and changes nothing where `skip` is 1.
    """

    skip: Tensor | None = None
    grad_scale: Tensor | None = None


def step_by_kernel(
    kernel: Kernel,
    group: Group,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    scalars: Scalars,
    numbers: Mapping[Tensor, int],
) -> None:
    """Update parameters of any shape in one call; `numbers` are their places in the whole optimizer."""
    lists, steps = kernel_tensors(kernel, parameters, states, narrow=is_narrow(group))
    torch._foreach_add_(steps, 1 if scalars.skip is None else [1 - scalars.skip] * len(steps))

    # local tensors: for DTensors the host would take as long to look at each as a GPU takes for a layer
    # Plain tensors are passed as they are: to detach each of them takes the host 1 % of a small model's step.
    parts = lists
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        parts = [[local(tensor) for tensor in tensors] for tensors in lists]
    step = kernel.step
    if is_narrow(group):
        places = [Place(numbers[parameter], local_slices(parameter)) for parameter in parameters]
        keys = [keys_of(place, count, len(kernel.states)) for place, count in zip(places, steps, strict=True)]
        step = functools.partial(step_in_fp32, kernel, keys=keys)
    lr, weight_decay = group["lr"], group["weight_decay"]
    step(parts, steps, lr=lr, weight_decay=weight_decay, skip=scalars.skip, grad_scale=scalars.grad_scale)


def step_experts_by_kernel(
    kernel: Kernel,
    group: Group,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    scalars: Scalars,
    numbers: Mapping[Tensor, int],
    factor_E: Tensor | None,
    alive_E: Tensor | None,
) -> None:
    """Update the experts of one layer as if each were a parameter of its own, with a rate and a step count (E,).

    The kernel is called for each expert; nothing is copied, and no value is read on the host of a GPU. An expert
    without a token is left alone, its states and step count too.
    """
    lists, steps = kernel_tensors(kernel, parameters, states, by_expert=True, narrow=is_narrow(group))
    if factor_E is None or alive_E is None:  # no load: all alike
        factor_E = torch.ones(parameters[0].shape[0], device=parameters[0].device)
        alive_E = factor_E > 0
    skip_E = (~alive_E).to(torch.float32)
    if scalars.skip is not None:
        skip_E = skip_E.maximum(scalars.skip)

    # decay that is not scaled goes on for all experts, so the kernel is not to do it
    weight_decay = group["weight_decay"]
    if not group["load_lr_decay"]:
        for weight in map(local, parameters):
            decayed = weight * (1 - group["lr"] * weight_decay)  # a factor on the device would be of weight's type
            weight.copy_(decayed if scalars.skip is None else torch.where(scalars.skip > 0, weight, decayed))
        weight_decay = 0.0

    # counts are of all experts on every rank, so that they are the same whatever the layout
    for step_E in steps:
        step_E.add_(1 - skip_E)

    # views of the rows of every tensor: those of this rank's experts
    rows = local_rows(parameters[0])
    rates, skips = (factor_E * group["lr"])[rows].unbind(), skip_E[rows].unbind()  # R scalars each
    counts = [step_E[rows].unbind() for step_E in steps]
    experts = [[local(tensor).unbind() for tensor in tensors] for tensors in lists]  # (R, M, N) -> R of (M, N)
    keys = []
    if is_narrow(group):
        places = [Place(numbers[parameter], local_slices(parameter)) for parameter in parameters]
        pairs = zip(places, steps, strict=True)
        keys = [keys_of(place, step_E[rows], len(kernel.states)) for place, step_E in pairs]
    for row, (rate, skip) in enumerate(zip(rates, skips, strict=True)):
        tensors = [[tensor[row] for tensor in tensors] for tensors in experts]
        row_steps = [count[row] for count in counts]
        step = kernel.step
        if keys:
            step = functools.partial(step_in_fp32, kernel, keys=[key.row(row, len(rates)) for key in keys])
        step(tensors, row_steps, lr=rate, weight_decay=weight_decay, skip=skip, grad_scale=scalars.grad_scale)


def kernel_tensors(
    kernel: Kernel,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    *,
    by_expert: bool = False,
    narrow: bool = False,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Lists of weights, gradients and each of a kernel's states, and of step counts: scalars, or by expert (E,).

    States that are not there yet are made, sharded as their parameter is; `narrow`: in bfloat16 where they may be.
    """
    own_states = [states[parameter] for parameter in parameters]
    for parameter, state in zip(parameters, own_states, strict=True):
        if "step" not in state:
            shape = parameter.shape[:1] if by_expert else ()
            count = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            fresh = {name: torch.zeros_like(parameter) for name in kernel.states}
            state.update(step=count, **(narrowed(fresh, kernel.rounded) if narrow else fresh))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    lists = [list(parameters), gradients, *([state[name] for state in own_states] for name in kernel.states)]
    return lists, [state["step"] for state in own_states]
