"""Learning rates of experts by their load (the paper, section 3.4.1), for any optimizer.

A parameter group with the keys that `load_lr` makes gives every expert, a row of the stacked tensors (E, ...), a
learning rate of its own: the group's scheduled rate times a factor that depends on how many tokens the expert got in
the whole optimizer step, over all ranks and micro-batches. `optimizer.step(load=...)` takes these loads; how a rate
reaches the rows of a tensor is in `titan_moe.optimizer.optimizer`.

Shapes: L MoE layers, E experts.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

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
    without a token in the step is not updated: its factor is 0 whatever the floor, and all that the optimizer keeps of
    it stays as it is; only decay that is not scaled goes on. Returns a parameter group's settings, none when off.
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


def keep_factors(
    states: Mapping[Tensor, dict[str, Tensor]], group: Group, load_LE: Tensor | None, skip: Tensor | None
) -> Tensor | None:
    """The factors (L, E) of this step; they and the average are kept in the states of the group's parameters.

    Without a load (torch makes the states of a checkpoint by such a step) there are none: None, all experts alike.
    Where `skip`, an fp32 scalar, is 1 they stay as they are. The states, `load_ema` and `load_factor`, are (E,) and the
    same on every rank, whatever the layout.
    """
    if load_LE is None:
        for parameter in group["params"]:
            ones_E = torch.ones(parameter.shape[0], device=parameter.device)
            states[parameter].update(load_ema=ones_E, load_factor=ones_E.clone())
        return None

    # all parameters of a layer have the same: one of each is read
    first = dict(zip(reversed(group["layers"]), reversed(group["params"]), strict=True))
    if "load_ema" in states[group["params"][0]]:
        before_LE, old_LE = (
            torch.stack([states[first[layer]][name] for layer in sorted(first)]) for name in ("load_ema", "load_factor")
        )
    else:
        before_LE = old_LE = torch.ones_like(load_LE, dtype=torch.float32)

    factor_LE, ema_LE = rate_factors(load_LE, before_LE, group)
    if skip is not None:
        ema_LE, factor_LE = (torch.where(skip > 0, *pair) for pair in ((before_LE, ema_LE), (old_LE, factor_LE)))
    for parameter, layer in zip(group["params"], group["layers"], strict=True):
        states[parameter].update(load_ema=ema_LE[layer], load_factor=factor_LE[layer])
    return factor_LE
