"""Transforms turn a gradient into the direction of an update. Here are the protocol, AdamW, momentum, torch's kernels.

`titan_moe.optimizer.optimizer` does the rest: states, rates, shards, what is no matrix. The other transforms are in
`shampoo`, `soap`, `muon` and `meta_shampoo`.

Shapes: R rows of a stacked tensor (the experts that this rank holds, or 1 for a dense matrix), M x N a matrix.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
MatmulDtype = Literal["float32", "bfloat16"]

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's first and second, by torch's names


class Tick(NamedTuple):
    """How many steps a parameter has taken, and what else a transform may ask for besides its gradient.

    `step` counts from 1 and is known on the host, so that what happens every n-th step needs no synchronisation.
    `steps` (R,) fp32 is each row's own count, this step included.
    `spare(gradient)` is contiguous memory of the gradient's shape to make the direction in. It holds anything finite,
    and the next call gives the same memory again.
    `weight()` is the weight (R, M, N) before the step, read only, for a transform that `reads_weight`.
    `alive` (R,) bool says which rows take part, None: all. The state of a row that does not must stay as it is, and its
    direction is not used.
    `offset`, less than the transform's `period`: this parameter's periodic work is so many steps later than usual.
    """

    step: int
    steps: Tensor
    spare: Callable[[Tensor], Tensor]
    weight: Callable[[], Tensor]
    alive: Tensor | None = None
    offset: int = 0


class Step(Protocol):
    """W <- W - lr (direction + weight_decay W) in one pass over memory, for many tensors of any shape at once.

    `tensors` are lists of weights, gradients and then each of the kernel's states and scalars. `steps` count this step
    already. Where `skip`, an fp32 scalar, is 1, nothing changes. Gradients are divided by `grad_scale`, perhaps
    in place.
    """

    def __call__(
        self,
        tensors: Sequence[list[Tensor]],
        steps: list[Tensor],
        lr: float | Tensor,
        weight_decay: float,
        *,
        skip: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Update the weights and the states in place; nothing is read on the host."""


class Kernel(NamedTuple):
    """The whole step of a transform that treats each element by itself, so that shapes and shards do not matter.

    `states` are the names of what it keeps for each element, zero at first, or as the weight those in `copies`.
    `scalars` are the names of what it keeps one fp32 number of for each parameter, or each expert, zero at first.
    Before a step `advance(scalars, steps, lr)` gives their new values, of one parameter or (E,) of all its experts.
    `average(weight, *states)` gives weights that are averaged over steps: they are to be evaluated and exported.
    """

    states: tuple[str, ...]
    step: Step
    copies: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    advance: Callable[[State, Tensor, Tensor], State] | None = None
    average: Callable[..., Tensor] | None = None


class Transform(NamedTuple):
    """Functions; the step is W <- W - lr (update(G, state, tick) + weight_decay W), then `retract` if there is one.

    `init(weight)` makes the state: contiguous tensors by name whose first dimension is that of `weight` (R, M, N), so
    that they are sharded as it is. A dense matrix may be sharded otherwise: of its weight only the shape is given.

    `update(gradient, state, tick)` gives the direction for a gradient; both are (R, M, N), fp32 and contiguous. It
    writes the state in place, because a copy would cost as much as the step. It does not know the learning rate, so
    that rates that differ by expert are exact for every transform.

    `by_rows`: update may be called for some rows at a time. A matrix with a dimension above `max_dim` is AdamW's. The
    periodic work of a group's matrices is spread over `period` steps (0: it is not).

    With a `kernel`, parameters of any shape are stepped by that, and not by `init` and `update`.

    `retract(weight, state, tick)` brings weights (R, M, N) back, in place, to where they are kept after each step: onto
    a sphere, for example. Rows that are not alive must stay as they are.

    `reads_weight`: update asks for `tick.weight()`. One that does not says so, which spares half of what is sent to the
    owner of a sharded dense matrix.
    """

    init: Callable[[Tensor], State]
    update: Callable[[Tensor, State, Tick], Tensor]
    by_rows: bool = True
    max_dim: int | None = None
    period: int = 0
    kernel: Kernel | None = None
    retract: Callable[[Tensor, State, Tick], None] | None = None
    reads_weight: bool = True


def adamw(*, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8) -> Transform:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019), fused where torch has it; the paper's default.

    A group may carry any of the arguments as its own value.

    The direction is m / (sqrt(v) + eps), both bias-corrected (Kingma and Ba, 2015, algorithm 1).
    """
    step = functools.partial(fused_adamw, betas=(beta1, beta2), eps=eps)

    def init(weight: Tensor) -> State:
        return {name: weight.new_zeros(weight.shape, dtype=torch.float32) for name in MOMENTS}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # The kernel's step with learning rate and decay of -1 takes any finite weight to 0 plus the direction: one pass
        # over memory, where the formula by operators would take six.
        direction = tick.spare(gradient)  # (R, M, N)
        tensors = [direction, gradient, *(state[name] for name in MOMENTS)]
        if tick.alive is None:
            step([[tensor] for tensor in tensors], [tick.steps[0]], -1.0, -1.0)
            return direction

        # rows with counts of their own, of which the kernel leaves out the dead ones
        for row, dead in enumerate((~tick.alive).float().unbind()):
            step([[tensor[row]] for tensor in tensors], [tick.steps[row]], -1.0, -1.0, skip=dead)
        return direction

    return Transform(init, update, kernel=Kernel(MOMENTS, step))


def momentum(beta: float, name: str = "exp_avg", *, correct_bias: bool = True) -> Transform:
    """Exponential average of the gradient, kept as `name`; bias-corrected as Adam's unless `correct_bias` is false."""

    def init(weight: Tensor) -> State:
        return {name: weight.new_zeros(weight.shape, dtype=torch.float32)}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        average = state[name]  # (R, M, N)
        if tick.alive is None:
            average.lerp_(gradient, 1 - beta)
        else:
            average.lerp_(gradient, ((1 - beta) * tick.alive).view(-1, 1, 1))
        return average / (1 - beta**tick.steps).view(-1, 1, 1) if correct_bias else average

    return Transform(init, update, reads_weight=False)


def never_called(*_: Any) -> Any:
    """The init and the update of a transform that is its kernel alone."""
    raise TypeError("this transform steps every parameter by its kernel, and gives no direction")


def keep_dead_rows(new: Tensor, old: Tensor, alive_R: Tensor) -> None:
    """Give the rows of `new` (R, ...) that are not alive what they have in `old`, in place."""
    new.copy_(torch.where(alive_R.view(-1, *[1] * (new.dim() - 1)), new, old))


def fused_adamw(
    tensors: Sequence[list[Tensor]],
    steps: list[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    *,
    betas: tuple[float, float],
    eps: float,
    skip: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Call torch's fused AdamW kernel: the `Step` whose states are the first and the second moments."""
    # the empty list is amsgrad's; `found_inf` is torch's name of `skip`
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


def fused_sgd(weight: Tensor, direction: Tensor, lr: float, weight_decay: float) -> None:
    """W <- W - lr (direction + weight_decay W) by torch's kernel, in one pass; both contiguous and of one dtype."""
    # the empty list is of momenta, which transforms keep themselves
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
