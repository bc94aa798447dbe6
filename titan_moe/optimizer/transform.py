"""Parts of optimizers: a transform turns the gradient of stacked matrices into the direction of their update.

Shapes: R rows of a stacked tensor (the experts that this rank holds, or 1 for a dense matrix), M x N a matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.runtime.dtensor import local

State = dict[str, Tensor]


class Tick(NamedTuple):
    """Where a parameter is in time.

    `step` counts from 1 and is known on the host, so that what happens every n-th step needs no synchronisation.
    `steps` (R,) fp32 is each row's own count, this step included. `spare(gradient)` is contiguous memory of that
    shape for the direction to be made in; it holds anything finite, and the next call gives it again. `alive` (R,)
    bool is None when every row takes part; the state of a row that does not must stay as it is, and its direction is
    not used.
    """

    step: int
    steps: Tensor
    spare: Callable[[Tensor], Tensor]
    alive: Tensor | None = None


class Transform(NamedTuple):
    """A pair of functions; the step is W <- W - lr (update(G, state, tick) + weight_decay W).

    `init(weight)` makes the state: contiguous tensors by name whose first dimension is that of `weight` (R, M, N), so
    that they are sharded as it is. `update(gradient, state, tick)` gives the direction, (R, M, N) fp32 from such a
    gradient, contiguous as well, and writes the state in place, because a copy of it would cost as much as the step. It
    does not know the learning rate: rates that differ by expert are then exact for every transform. `by_rows`: it may
    be called for some rows at a time.
    """

    init: Callable[[Tensor], State]
    update: Callable[[Tensor, State, Tick], Tensor]
    by_rows: bool = True


def adam(beta1: float, beta2: float, eps: float) -> Transform:
    """Adam's direction m / (sqrt(v) + eps), both bias-corrected (Kingma and Ba, 2015, algorithm 1)."""

    def init(weight: Tensor) -> State:
        return {name: weight.new_zeros(weight.shape, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # torch's fused AdamW with learning rate and decay of -1, which takes any finite weight to 0 plus the direction:
        # one pass over memory
        direction = tick.spare(gradient)
        tensors = [direction, gradient, state["exp_avg"], state["exp_avg_sq"]]
        if tick.alive is None:
            fused_adamw([[tensor] for tensor in tensors], [tick.steps[0]], -1.0, (beta1, beta2), eps, -1.0)
            return direction
        for row, dead in enumerate((~tick.alive).float().unbind()):
            one = [[tensor[row]] for tensor in tensors]
            fused_adamw(one, [tick.steps[row]], -1.0, (beta1, beta2), eps, -1.0, skip=dead)
        return direction

    return Transform(init, update)


def fused_adamw(
    tensors: Sequence[list[Tensor]],
    steps: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    skip: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Call torch's fused AdamW kernel on lists of weights, gradients, first moments and second moments.

    `steps` count this step already; `skip`, an fp32 scalar, leaves everything as it is where it is 1; gradients are
    divided by `grad_scale`, in place.
    """
    weights, gradients, exp_avgs, exp_avg_sqs = tensors
    torch._fused_adamw_(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=skip,
    )


def make_adamw_states(parameters: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """AdamW's first state, with torch's names, of parameters that have none; moments are sharded as they are."""
    for parameter in parameters:
        if "step" not in state[parameter]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state[parameter].update(step=torch.zeros((), dtype=torch.float32, device=parameter.device), **moments)


def step_adamw(
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """AdamW's step of those parameters of a group that have gradients; these are divided by `grad_scale`.

    Where `found_inf`, an fp32 scalar, is 1, nothing changes, but states that were missing are there, at zero.
    This rank's parts go to the kernel, not DTensors: a look at each of these takes the host as long as a GPU takes for
    a layer.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return
    make_adamw_states(parameters, state)
    states = [state[parameter] for parameter in parameters]
    steps = [own["step"] for own in states]
    torch._foreach_add_(steps, 1 if found_inf is None else [1 - found_inf] * len(steps))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = ([own[name] for own in states] for name in ("exp_avg", "exp_avg_sq"))
    lists = [[local(tensor) for tensor in tensors] for tensors in (parameters, gradients, *moments)]
    settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    fused_adamw(lists, steps, *settings, skip=found_inf, grad_scale=grad_scale)


def fused_sgd(weight: Tensor, direction: Tensor, lr: float, weight_decay: float) -> None:
    """W <- W - lr (direction + weight_decay W) by torch's kernel, in one pass; both contiguous and of one dtype."""
    torch._fused_sgd_(
        [weight],
        [direction],
        [],
        weight_decay=weight_decay,
        momentum=0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def momentum(beta: float, name: str = "exp_avg", *, correct_bias: bool = True) -> Transform:
    """Exponential average of the gradient, kept as `name`; bias-corrected as Adam's unless `correct_bias` is false."""

    def init(weight: Tensor) -> State:
        return {name: weight.new_zeros(weight.shape, dtype=torch.float32)}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        average = state[name]
        if tick.alive is None:
            average.lerp_(gradient, 1 - beta)
        else:
            average.lerp_(gradient, ((1 - beta) * tick.alive).view(-1, 1, 1))
        return average / (1 - beta**tick.steps).view(-1, 1, 1) if correct_bias else average

    return Transform(init, update)
