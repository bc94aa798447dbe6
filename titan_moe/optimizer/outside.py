"""Updates by another torch.optim.Optimizer, of which no more is known than torch.optim's interface.

Shapes: L MoE layers, E experts, R those of them that this rank holds.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from titan_moe.optimizer.kernels import Scalars
from titan_moe.optimizer.load_lr import Group, keep_factors
from titan_moe.optimizer.transform import State, keep_dead_rows
from titan_moe.runtime.dtensor import local, local_rows


def scale_update(parameter: Tensor, old: Tensor, factor_R: Tensor, group: Group) -> None:
    """Replace this rank's rows by old + factor * (new - old); decay is in full unless the group scales it too."""
    new = local(parameter)
    factor = factor_R.to(new.dtype).view(-1, *[1] * (new.dim() - 1))
    new.copy_(torch.lerp(old, new, factor))
    if not group["load_lr_decay"]:
        new.addcmul_(old, 1 - factor, value=-group["lr"] * group.get("weight_decay", 0.0))  # what lerp took of it


def takes_scalars(outside: torch.optim.Optimizer) -> bool:
    """Whether an optimizer from outside is given `grad_scale` and `found_inf`, which torch's fused ones read.

    Not where rates depend on load: a step that it skips on the device would be scaled all the same.
    """
    by_load = any("load_lr" in group for group in outside.param_groups)
    return getattr(outside, "_step_supports_amp_scaling", False) and not by_load


def skips_by_itself(outside: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step changes nothing where its `found_inf` is 1, on the device.

    Not torch's SGD: its first momentum is memory that is not initialized, and stays so in a step that is skipped.
    """
    return takes_scalars(outside) and not isinstance(outside, torch.optim.SGD)


def step_outside(
    outside: torch.optim.Optimizer,
    all_states: Mapping[Tensor, State],
    load_LE: Tensor | None,
    scalars: Scalars,
) -> list[dict[int, Tensor]]:
    """Let an optimizer from outside take its step, and scale its experts' updates if their rates depend on load.

    The weights p of an expert with factor r become p_old + r (p_new - p_old). That is a learning rate of r * lr for
    every optimizer whose update is proportional to it. Decay that is not scaled is taken to be decoupled, p -= lr *
    weight_decay * p. An expert without a token gets back what has the parameter's shape in the state; a count of
    steps is one for all experts. During the step this costs a copy of the experts and of these states. Returns what
    `keep_factors` gives for each group whose rates depend on load.
    """
    # only torch.optim's interface is there to ask, so what must stay is copied before the step
    by_load = [group for group in outside.param_groups if "load_lr" in group]
    experts = [p for group in by_load for p in group["params"] if p.grad is not None]
    weights = {parameter: local(parameter).clone() for parameter in experts}
    states = {
        p: {k: local(v).clone() for k, v in all_states[p].items() if isinstance(v, Tensor) and v.shape == p.shape}
        for p in experts
    }

    # torch's fused ones have the scalars from here for this step, as from torch.amp.GradScaler
    reads_scalars = takes_scalars(outside)
    if reads_scalars:
        outside.grad_scale = scalars.grad_scale  # pyrefly: ignore[missing-attribute]
        outside.found_inf = scalars.skip  # pyrefly: ignore[missing-attribute]
    outside.step()
    if reads_scalars:
        outside.grad_scale = outside.found_inf = None  # pyrefly: ignore[missing-attribute]

    # without a load, which is so while torch makes the states of a checkpoint, all experts are alike
    factors = [keep_factors(all_states, group, load_LE, scalars.skip) for group in by_load]
    for group, by_layer in zip(by_load, factors, strict=True):
        for parameter, layer in zip(group["params"], group["layers"], strict=True):
            if load_LE is not None and parameter in weights:
                rows = local_rows(parameter)
                scale_update(parameter, weights[parameter], by_layer[layer][rows], group)
                for name, old in states[parameter].items():
                    keep_dead_rows(local(all_states[parameter][name]), old, load_LE[layer][rows] > 0)
    return factors
