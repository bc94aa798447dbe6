"""Updates by a kernel, which makes the whole step of tensors of any shape; and kernels made of a formula.

Shapes: E experts, R those of them that this rank holds, M x N the matrix of one.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.rounding import Place, is_narrow, keys_of, narrowed, step_in_fp32
from titan_moe.optimizer.transform import Kernel, State, Tick, Transform, keep_dead_rows
from titan_moe.runtime.dtensor import local, local_rows, local_slices

# Elements whose new values are made together. On a CPU the temporaries of so many stay in the cache; a GPU's kernels
# are to be few, and 128 MiB a temporary is little there.
CPU_ELEMENTS = 1 << 17
GPU_ELEMENTS = 1 << 25

# `direction(gradients, states, steps)` gives directions and new states of lists of tensors, fp32, and writes into none
# of its arguments. `states` are a list of tensors for each state, `steps` fp32 scalars that count this step already.
Direction = Callable[[list[Tensor], list[list[Tensor]], list[Tensor]], tuple[Sequence[Tensor], list[Sequence[Tensor]]]]


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
    advance(kernel, parameters, states, group["lr"], scalars.skip)

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
    advance(kernel, parameters, states, factor_E * group["lr"], skip_E)

    # views of this rank's experts: (R, M, N) -> R of (M, N), and of what all ranks have of all, (E,) -> R scalars
    rows, num_lists = local_rows(parameters[0]), len(lists) - len(kernel.scalars)
    rates, skips = (factor_E * group["lr"])[rows].unbind(), skip_E[rows].unbind()
    counts = [step_E[rows].unbind() for step_E in steps]
    experts = [[local(tensor).unbind() for tensor in tensors] for tensors in lists[:num_lists]]
    experts += [[number_E[rows].unbind() for number_E in numbers] for numbers in lists[num_lists:]]
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


def advance(
    kernel: Kernel,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    lr: float | Tensor,
    skip: Tensor | None,
) -> None:
    """Move a kernel's scalars on by a step, those of all experts on every rank; not where `skip` is 1."""
    if kernel.advance is None:
        return
    for state in (states[parameter] for parameter in parameters):
        before = {name: state[name] for name in kernel.scalars}
        rate = lr if isinstance(lr, Tensor) else torch.full_like(state["step"], lr)  # filled there: a copy would wait
        for name, new in kernel.advance(before, state["step"], rate).items():
            state[name].copy_(new if skip is None else torch.where(skip > 0, state[name], new))


def kernel_tensors(
    kernel: Kernel,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    *,
    by_expert: bool = False,
    narrow: bool = False,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Lists of weights, gradients and each of a kernel's states, and of scalars and step counts, or by expert (E,).

    States that are not there yet are made, sharded as their parameter is; `narrow`: in bfloat16 where they may be.
    """
    own_states = [states[parameter] for parameter in parameters]
    for parameter, state in zip(parameters, own_states, strict=True):
        if "step" not in state:
            shape = parameter.shape[:1] if by_expert else ()
            numbers = {
                name: torch.zeros(shape, dtype=torch.float32, device=parameter.device)
                for name in ("step", *kernel.scalars)
            }
            of_elements = {name: torch.zeros_like(parameter) for name in kernel.states if name not in kernel.copies}
            of_elements |= {name: parameter.detach().clone() for name in kernel.copies}
            state.update(numbers | (narrowed(of_elements, kernel.rounded) if narrow else of_elements))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    names = (*kernel.states, *kernel.scalars)
    lists = [list(parameters), gradients, *([state[name] for state in own_states] for name in names)]
    return lists, [state["step"] for state in own_states]


def elementwise(states: tuple[str, ...], direction: Direction) -> Transform:
    """Make the transform, and its kernel, of a formula that treats each element by itself.

    `states` are the names of what is kept for each element, zero at first. The formula is written with torch._foreach_*
    functions; rates, decay, skipped steps and types other than fp32 are looked after here.
    """

    def init(weight: Tensor) -> State:
        return {name: weight.new_zeros(weight.shape, dtype=torch.float32) for name in states}

    # for a transform around this one; a group that is updated by this one alone is stepped by the kernel
    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        rows = [list(state[name].unbind()) for name in states]  # (R, M, N) -> R of (M, N)
        directions, new_rows = called(direction, list(gradient.unbind()), rows, list(tick.steps.unbind()))
        for name, of_rows in zip(states, new_rows, strict=True):
            new = torch.stack(list(of_rows))
            if tick.alive is not None:
                keep_dead_rows(new, state[name], tick.alive)
            state[name].copy_(new)
        return torch.stack(list(directions))  # (R, M, N)

    return Transform(init, update, kernel=Kernel(states, functools.partial(step_elementwise, direction)))


def called(
    direction: Direction, gradients: list[Tensor], states: list[list[Tensor]], steps: list[Tensor]
) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
    """Call a formula. Raises ValueError where it does not give a direction a gradient, and each state anew."""
    given = direction(gradients, states, steps)
    lengths = [len(gradients)] * (1 + len(states))
    pair = isinstance(given, tuple) and len(given) == 2
    if not pair or [len(given[0]), *(len(news) for news in given[1])] != lengths:
        raise ValueError(
            f"{getattr(direction, '__qualname__', direction)} must return (directions, new_states): {len(gradients)} "
            f"directions, one for each gradient, and {len(states)} lists of as many, one for each state"
        )
    return given


def step_elementwise(
    direction: Direction,
    tensors: Sequence[list[Tensor]],
    steps: list[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    *,
    skip: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Take the `Step` along the direction of a formula."""
    for part, counts in chunks(tensors, steps):
        # all is computed in fp32, so that bf16 is rounded once
        weights, gradients, *states = ([tensor.float() for tensor in chunk] for chunk in part)
        if grad_scale is not None:
            torch._foreach_div_(gradients, grad_scale)
        directions, new_states = called(direction, gradients, states, counts)

        moved = torch._foreach_mul(weights, 1 - lr * weight_decay)
        torch._foreach_sub_(moved, torch._foreach_mul(list(directions), lr))  # pyrefly: ignore[no-matching-overload]
        old_weights, _, *old_states = part
        for olds, news in zip([old_weights, *old_states], [moved, *new_states], strict=True):
            replace(olds, news, skip)


def replace(olds: list[Tensor], news: Sequence[Tensor], skip: Tensor | None) -> None:
    """Write new values over old ones, but none where `skip` is 1: they may be NaN then."""
    if skip is None:
        torch._foreach_copy_(olds, list(news))
        return
    for old, new in zip(olds, news, strict=True):
        torch.where(skip > 0, old, new.to(old.dtype), out=old)


def chunks(tensors: Sequence[list[Tensor]], steps: list[Tensor]) -> Iterator[tuple[list[list[Tensor]], list[Tensor]]]:
    """Views of all elements of some lists of tensors, some at a time: lists again, and the step count of each view."""
    limit = elements_at_once(tensors[0][0].device)
    views: list[Sequence[Tensor]] = []
    counts: list[Tensor] = []
    elements = 0
    for *of_one, count in zip(*tensors, steps, strict=True):
        for piece in pieces(of_one, limit):
            # small tensors are gathered until they are as many elements as one large one is cut into
            elements += piece[0].numel()
            if views and elements > limit:
                yield [list(column) for column in zip(*views, strict=True)], counts
                views, counts, elements = [], [], piece[0].numel()
            views.append(piece)
            counts.append(count)
    yield [list(column) for column in zip(*views, strict=True)], counts


def elements_at_once(device: torch.device) -> int:
    """How many elements' new values are made together."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


def pieces(tensors: Sequence[Tensor], limit: int) -> Iterator[Sequence[Tensor]]:
    """Cut tensors of one shape into views of at most so many elements, or of one row; in memory they may lie anyhow."""
    first = tensors[0]
    if first.numel() <= limit or first.dim() == 0:
        yield tensors
    elif first[0].numel() > limit:
        for rows in zip(*(tensor.unbind() for tensor in tensors), strict=True):
            yield from pieces(rows, limit)
    else:
        count = limit // first[0].numel()
        yield from zip(*(tensor.split(count) for tensor in tensors), strict=True)
