"""Schedule-free AdamW: an average over the steps in place of a rate that falls (Defazio et al., 2024, 2405.15682).

With a step's gradient g at the weights y that are trained, its rate lr and its number k from 1:

    v <- beta2 v + (1 - beta2) g^2
    d = g / (sqrt(v / (1 - beta2^k)) + eps) + weight_decay y
    z <- z - lr d
    x <- (1 - c) x + c z       with c = s / (sum of s so far), s = k^r (largest lr so far)^weight_lr_power
    y <- beta1 x + (1 - beta1) z

x, the average, is what evaluation and checkpoints take. It is not stored, as it follows from y and z. Equal to the
authors' package, schedulefree 1.4.1, whose `warmup_steps` is ours of [lr_scheduler].
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titan_moe.optimizer.kernels import elements_at_once, pieces
from titan_moe.optimizer.transform import Kernel, State, Transform, never_called


def schedule_free_adamw(
    *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, weight_lr_power: float = 2.0, r: float = 0.0
) -> Transform:
    """AdamW whose weights are averaged over steps, for a constant rate after warmup (Defazio et al., 2024).

    Evaluation, checkpoints and exports have the averaged weights. A step counts in the average by
    step^r times (the largest rate so far)^`weight_lr_power`. With `beta1` the average mixes into the weights that are
    trained.
    """
    if not 0 < beta1 < 1:
        raise ValueError(f"optimizer.beta1 = {beta1}: schedule_free_adamw divides by it: it must be above 0, below 1")

    # Numbers of all experts, which every rank moves on alike; what a step does to elements sees this rank's part alone.
    def advance(scalars: State, steps: Tensor, lr: Tensor) -> State:
        largest = torch.maximum(scalars["lr_max"], lr)
        return {"lr_max": largest, "weight_sum": scalars["weight_sum"] + steps**r * largest**weight_lr_power}

    def share(steps: Tensor, lr_max: Tensor, weight_sum: Tensor) -> Tensor:
        return torch.where(weight_sum > 0, steps**r * lr_max**weight_lr_power / weight_sum, 0.0)

    # x of y and z, so that x takes no memory
    def average(weight: Tensor, z: Tensor, _: Tensor) -> Tensor:
        return torch.lerp(weight, z, 1 - 1 / beta1)

    step = functools.partial(schedule_free_step, share=share, betas=(beta1, beta2), eps=eps)
    states, scalars = ("z", "exp_avg_sq"), ("lr_max", "weight_sum")
    kernel = Kernel(states, step, copies=("z",), scalars=scalars, advance=advance, average=average)
    return Transform(never_called, never_called, kernel=kernel)


def schedule_free_step(
    tensors: Sequence[list[Tensor]],
    steps: list[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    *,
    share: Callable[[Tensor, Tensor, Tensor], Tensor],
    betas: tuple[float, float],
    eps: float,
    skip: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """The `Step` whose states are z and the second moment; `share` of steps and scalars is z's part of the average."""
    beta1, beta2 = betas
    for *parts, step, lr_max, weight_sum in zip(*tensors[:4], steps, *tensors[4:], strict=True):
        c = share(step, lr_max, weight_sum)
        correction = 1 - beta2**step
        along = lr * (beta1 * (1 - c) - 1)

        # y mixed from the new x and z, in terms of the old y and z: x is not stored
        for weight, gradient, z, square in pieces(parts, elements_at_once(step.device)):
            if grad_scale is not None:
                gradient.div_(grad_scale)
            new_square = (square * beta2).addcmul_(gradient, gradient, value=1 - beta2)
            direction = gradient / (new_square / correction).sqrt_().add_(eps)
            direction.add_(weight, alpha=weight_decay)
            keep(weight, torch.lerp(weight, z, c).addcmul_(direction, along), skip)
            keep(z, z - direction * lr, skip)
            keep(square, new_square, skip)


def keep(tensor: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Put new values into a tensor, unless `skip`, a scalar on its device, is 1."""
    tensor.copy_(new if skip is None else torch.where(skip > 0, tensor, new))
