"""Learning rates of experts by their load (the paper, section 3.4.1), for any optimizer.

In a parameter group with the keys that `load_lr` makes, every expert, a row of the stacked tensors (E, ...), has a
learning rate of its own: the group's scheduled rate times a factor. The factor depends on how many tokens the expert
got in the whole optimizer step, over all ranks and micro-batches. `optimizer.step(load=...)` takes these loads; how a
rate reaches the rows of a tensor is in `titan_moe.optimizer.optimizer`.

Shapes: L MoE layers, l those of them that a group has parameters of, E experts.
"""

import math
from collections.abc import Mapping, Sequence
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
        raise ValueError(f"load_lr_floor ({load_lr_floor}) must be at most load_lr_ceiling ({load_lr_ceiling})")

    # the optimizer goes by the key `load_lr`: a group without it has one rate for all
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


def expand_load_lr(arguments: Group, *, top_k: int, key: str = "optimizer.expert") -> Group:
    """Replace the `load_lr` arguments of a group, the table `key`, by the settings that they mean."""
    given = {key: value for key, value in arguments.items() if key.startswith("load_lr")}
    rest = {key: value for key, value in arguments.items() if key not in given}
    try:
        settings = load_lr(**given)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
    return {**rest, **settings, "load_lr_top_k": top_k} if settings else rest


def rate_factors(load_LE: Tensor, ema_LE: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Factors of the experts' learning rates, (L, E) fp32, and the new average (L, E) of load / mean load.

    `group` has the settings of `load_lr`. In a layer where nothing was routed every factor is 0.
    """
    # fp64 holds any sum of tokens exactly; a layer without a token has 0 / 0, which counts as balance
    load_LE = load_LE.to(torch.float64)
    ratio_LE = (load_LE / load_LE.mean(-1, keepdim=True)).nan_to_num(1.0).to(torch.float32)
    ema_LE = torch.lerp(ratio_LE, ema_LE, group["load_lr_ema"])

    # load / all tokens is load / mean load times top_k / E, so that one average serves both
    fraction = group["load_lr_top_k"] / load_LE.shape[-1] if group["load_lr"] == "batch_fraction" else 1.0
    factor_LE = (ema_LE * fraction) ** group["load_lr_power"]
    factor_LE = factor_LE.clamp(group["load_lr_floor"], group["load_lr_ceiling"])
    return torch.where(load_LE > 0, factor_LE, 0.0), ema_LE


def keep_factors(
    states: Mapping[Tensor, dict[str, Tensor]], group: Group, load_LE: Tensor | None, skip: Tensor | None
) -> dict[int, Tensor]:
    """Make the factors of this step, and keep them and the average in the states of the group's parameters.

    Returns the factors (E,) of each layer that the group has parameters of, by its index in the load (L, E); none
    without a load: all experts are alike then. The states, `load_ema` and `load_factor`, are (E,) and the same on every
    rank, whatever the layout. Where `skip`, an fp32 scalar, is 1, they stay as they are.
    """
    # torch makes the states that a checkpoint is loaded into by a step that knows no load
    if load_LE is None:
        for parameter in group["params"]:
            ones_E = torch.ones(parameter.shape[0], device=parameter.device)
            states[parameter].update(load_ema=ones_E, load_factor=ones_E.clone())
        return {}

    # all parameters of a layer have the same: one of each is read
    of_layer = parameter_by_layer(group)
    load_lE = torch.stack([load_LE[layer] for layer in of_layer])  # (L, E) -> (l, E), the group's layers
    if "load_ema" in states[group["params"][0]]:
        before_lE, old_lE = (
            torch.stack([states[parameter][name] for parameter in of_layer.values()])
            for name in ("load_ema", "load_factor")
        )
    else:
        before_lE = old_lE = torch.ones_like(load_lE, dtype=torch.float32)

    # a step that is skipped leaves both as they were, by a choice on the device
    factor_lE, ema_lE = rate_factors(load_lE, before_lE, group)
    if skip is not None:
        ema_lE, factor_lE = (torch.where(skip > 0, *pair) for pair in ((before_lE, ema_lE), (old_lE, factor_lE)))
    ema, factor = (dict(zip(of_layer, rows.unbind(), strict=True)) for rows in (ema_lE, factor_lE))
    for parameter, layer in zip(group["params"], group["layers"], strict=True):
        states[parameter].update(load_ema=ema[layer], load_factor=factor[layer])
    return factor


def parameter_by_layer(group: Group) -> dict[int, Tensor]:
    """One parameter of each MoE layer that a group has any of, in the layers' order."""
    by_layer = dict(zip(group["layers"], group["params"], strict=True))
    return {layer: by_layer[layer] for layer in sorted(by_layer)}


def layer_factors(groups: Sequence[Mapping[int, Tensor]], load_LE: Tensor | None) -> Tensor | None:
    """The factors (L, E) of what `keep_factors` gave for some groups, None where it gave nothing.

    A layer of which several groups have parameters has those of the first one; a layer of which none has any has ones.
    """
    by_layer = {layer: factor_E for group in reversed(groups) for layer, factor_E in group.items()}
    if not by_layer or load_LE is None:
        return None
    ones_E = torch.ones(load_LE.shape[1], device=load_LE.device)
    return torch.stack([by_layer.get(layer, ones_E) for layer in range(len(load_LE))])
