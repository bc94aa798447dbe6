"""Learning rates of experts by their load (the paper, section 3.4.1), for any optimizer.

A parameter group with the keys that `load_lr` makes gives every expert, a row of the stacked tensors (E, ...), a
learning rate of its own: the group's scheduled rate times a factor that depends on how many tokens the expert got in
the whole optimizer step, over all ranks and micro-batches. `step_by_load` hands these loads to `optimizer.step`.

An optimizer whose `step` takes `load` scales the rows itself, as AdamW does; `scale_steps` teaches it to any other.

Shapes: L MoE layers, E experts, R the rows (experts) of a tensor that this rank holds.
"""

import inspect
import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from titan_moe.runtime.dtensor import local, rows

Group = dict[str, Any]  # of torch.optim: "params" and their settings


def load_lr(
    *,
    load_lr: Annotated[Literal["none", "batch_fraction", "ideal_normalized"], "rate factor of expert i"] = "none",
    load_lr_power: Annotated[float, "the factor is raised to this power"] = 1.0,
    load_lr_ema: Annotated[float, "loads are averaged over steps, this much of the old average kept (0: off)"] = 0.0,
    load_lr_floor: Annotated[float, "smallest factor of an expert that got tokens"] = 0.0,
    load_lr_ceiling: Annotated[float, "largest factor"] = math.inf,
    load_lr_decay: Annotated[bool, "the factor scales weight decay too, as AdamW does with its rate"] = True,
) -> Group:
    """Scale each expert's rate by its load: batch_fraction r = L_i / T, ideal_normalized r = L_i / mean L.

    L_i are the tokens of expert i in the optimizer step and T = sum L / top_k all its tokens, so batch_fraction is
    ideal_normalized times top_k / E (the paper, section 3.4.1). The factor is
    clamp(average(r) ** power, floor, ceiling). The average is kept of L_i / mean L and begins at 1, balance. An expert
    without a token in the step is not updated: its factor is 0 whatever the floor, and AdamW's moments and step count
    of it stay as they are; only decay that is not scaled goes on. Returns a parameter group's settings, none when off.
    Raises ValueError when the floor is above the ceiling.
    """
    if load_lr_floor > load_lr_ceiling:
        raise ValueError(
            f"optimizer.expert.load_lr_floor ({load_lr_floor}) must be at most load_lr_ceiling ({load_lr_ceiling})"
        )
    if load_lr == "none":
        return {}
    return {
        "load_lr": load_lr,
        "load_lr_power": load_lr_power,
        "load_lr_ema": load_lr_ema,
        "load_lr_floor": load_lr_floor,
        "load_lr_ceiling": load_lr_ceiling,
        "load_lr_decay": load_lr_decay,
    }


def expand_load_lr(arguments: Group, *, top_k: int) -> Group:
    """Replace the `load_lr` arguments of a group by the settings that they mean."""
    given = {key: value for key, value in arguments.items() if key.startswith("load_lr")}
    rest = {key: value for key, value in arguments.items() if key not in given}
    settings = load_lr(**given)
    return {**rest, **settings, "load_lr_top_k": top_k} if settings else rest


def rate_factors(load_LE: Tensor, ema_LE: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Factors of the experts' learning rates, (L, E) fp32, and the new average of their loads over the mean load.

    `group` has the settings of `load_lr`. In a layer where nothing was routed every factor is 0.
    """
    load_LE = load_LE.to(torch.float64)
    ratio_LE = (load_LE / load_LE.mean(-1, keepdim=True)).nan_to_num(1.0).to(torch.float32)
    ema_LE = torch.lerp(ratio_LE, ema_LE, group["load_lr_ema"])
    fraction = group["load_lr_top_k"] / load_LE.shape[-1] if group["load_lr"] == "batch_fraction" else 1.0
    factor_LE = (ema_LE * fraction) ** group["load_lr_power"]
    factor_LE = factor_LE.clamp(group["load_lr_floor"], group["load_lr_ceiling"])
    return torch.where(load_LE > 0, factor_LE, 0.0), ema_LE


def step_by_load(optimizer: Optimizer, load_LE: Tensor) -> Tensor | None:
    """Take the optimizer's step; where a group has load-based rates, with these loads. Returns their factors (L, E)."""
    groups = load_groups(optimizer)
    if not groups:
        optimizer.step()
        return None
    optimizer.step(load=load_LE)  # pyrefly: ignore[no-matching-overload]
    (group,) = groups
    return _of_layers(optimizer, group, "load_factor")


def load_groups(optimizer: Optimizer) -> list[Group]:
    """Groups that have load-based rates: the expert group, or none."""
    return [group for group in optimizer.param_groups if "load_lr" in group]


def next_factors(optimizer: Optimizer, group: Group, load_LE: Tensor | None) -> Tensor | None:
    """Factors (L, E) of this step; they and the average are kept in the states of the group's parameters.

    Without a load (torch makes the states of a checkpoint by such a step) there are none: None, all experts alike.
    Where the optimizer's `found_inf` is 1 they stay as they are. The states, `load_ema` and `load_factor`, are (E,) and
    the same on every rank, whatever the layout.
    """
    if load_LE is None:
        for parameter in group["params"]:
            ones_E = torch.ones(parameter.shape[0], device=parameter.device)
            optimizer.state[parameter].update(load_ema=ones_E, load_factor=ones_E.clone())
        return None
    if "load_ema" in optimizer.state[group["params"][0]]:
        before_LE, old_LE = (_of_layers(optimizer, group, name) for name in ("load_ema", "load_factor"))
    else:
        before_LE = old_LE = torch.ones_like(load_LE, dtype=torch.float32)
    factor_LE, ema_LE = rate_factors(load_LE, before_LE, group)
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        ema_LE, factor_LE = (torch.where(found_inf > 0, *pair) for pair in ((before_LE, ema_LE), (old_LE, factor_LE)))
    for parameter, layer in zip(group["params"], group["layers"], strict=True):
        optimizer.state[parameter].update(load_ema=ema_LE[layer], load_factor=factor_LE[layer])
    return factor_LE


def _of_layers(optimizer: Optimizer, group: Group, name: str) -> Tensor:
    """Stack a state (E,) that all expert parameters of a layer share: (L, E)."""
    first = dict(zip(reversed(group["layers"]), reversed(group["params"]), strict=True))
    return torch.stack([optimizer.state[first[layer]][name] for layer in sorted(first)])


def scale_steps(optimizer: Optimizer) -> None:
    """Make `optimizer.step(load=load_LE)` scale each expert's update, where the optimizer does not do so itself.

    p becomes p_old + r (p_new - p_old), which is a learning rate of r * lr for every optimizer whose update is
    proportional to it; decay that is not scaled is taken to be decoupled, p -= lr * weight_decay * p. It costs a copy
    of the experts' parameters during the step. A fused optimizer is said to be none: what it skips on the device would
    be scaled all the same. What the optimizer keeps of a dead expert sees a zero gradient, as it
    would without load-based rates.
    """
    if "load" in inspect.signature(type(optimizer).step).parameters:
        return
    before: dict[Tensor, Tensor] = {}
    loads: list[Tensor | None] = []

    @torch.no_grad()
    def remember(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        loads.append(kwargs.pop("load", None))
        parameters = [p for group in load_groups(optimizer) for p in group["params"] if p.grad is not None]
        before.update({p: local(p).clone() for p in parameters})
        return args, kwargs

    @torch.no_grad()
    def scale(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        load = loads.pop()
        for group in load_groups(optimizer):
            factor_LE = next_factors(optimizer, group, load)
            if factor_LE is not None:
                for parameter, layer in zip(group["params"], group["layers"], strict=True):
                    if parameter in before:
                        _scale_update(parameter, before[parameter], factor_LE[layer], group)
        before.clear()

    optimizer._step_supports_amp_scaling = False  # pyrefly: ignore[missing-attribute]
    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)


def _scale_update(parameter: Tensor, old: Tensor, factor_E: Tensor, group: Group) -> None:
    """Replace this rank's rows by old + factor * (new - old); decay in full unless it is scaled too."""
    new = local(parameter)
    factor = factor_E[rows(parameter)].to(new.dtype).view(-1, *[1] * (new.dim() - 1))
    new.copy_(torch.lerp(old, new, factor))
    if not group["load_lr_decay"]:
        new.addcmul_(old, 1 - factor, value=-group["lr"] * group["weight_decay"])
