"""AdamW as torch has it, fused, with rows of their own learning rate where a group asks for load-based rates.

Shapes: E experts, R the rows (experts) of a tensor that this rank holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titan_moe.optimizer.load_lr import Group, next_factors
from titan_moe.optimizer.transform import fused_adamw, step_adamw
from titan_moe.runtime.dtensor import local, rows


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step also takes `load` (L, E), tokens per expert, for groups with load-based rates.

    There every expert is updated as if it were a parameter of its own, with the learning rate factor * lr and a step
    count of its own (state `step` is (E,)): torch's fused kernel is called for each expert, and nothing is copied. An
    expert without a token is left alone, moments and step count too. Other groups are updated as torch does it.

    Its attributes `grad_scale` and `found_inf`, None or fp32 scalars, are torch's for fused optimizers: gradients are
    divided by the one, and where the other is 1 a step changes nothing.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, load: Tensor | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "load_lr" in group:
                self._step_experts(group, load)
            else:
                scales = {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
                step_adamw(group, group["params"], self.state, **scales)
        return loss

    def _step_experts(self, group: Group, load: Tensor | None) -> None:
        """Update the expert parameters of all layers, layer by layer."""
        layers: dict[int, list[Tensor]] = {}
        for parameter, layer in zip(group["params"], group["layers"], strict=True):
            if parameter.grad is not None:
                layers.setdefault(layer, []).append(parameter)
                if "step" not in self.state[parameter]:
                    self.state[parameter].update(_fresh_state(parameter))
        factor_LE = next_factors(self, group, load)
        for layer, parameters in layers.items():
            if load is None or factor_LE is None:
                factor_E = torch.ones(parameters[0].shape[0], device=parameters[0].device)
                self._step_layer(group, parameters, factor_E, torch.zeros_like(factor_E))
            else:
                self._step_layer(group, parameters, factor_LE[layer], (load[layer] == 0).to(torch.float32))

    def _step_layer(self, group: Group, parameters: list[Tensor], factor_E: Tensor, is_dead_E: Tensor) -> None:
        """Update the expert parameters of one layer, expert by expert; no value is read on the host of a GPU."""
        states = [self.state[parameter] for parameter in parameters]
        weight_decay = group["weight_decay"]
        is_skipped_E = is_dead_E if self.found_inf is None else is_dead_E.maximum(self.found_inf)
        if not group["load_lr_decay"]:
            for weight in map(local, parameters):
                decayed = weight * (1 - group["lr"] * weight_decay)  # a factor on the device would be of weight's type
                weight.copy_(decayed if self.found_inf is None else torch.where(self.found_inf > 0, weight, decayed))
            weight_decay = 0.0
        for state in states:
            state["step"] += 1 - is_skipped_E

        mine = rows(parameters[0])
        rates, skips = (factor_E * group["lr"])[mine].unbind(), is_skipped_E[mine].unbind()
        steps = [state["step"][mine].unbind() for state in states]
        row_lists = [
            [local(tensor).unbind() for tensor in tensors]
            for tensors in (
                parameters,
                [parameter.grad for parameter in parameters if parameter.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            )
        ]
        for row, (rate, skip) in enumerate(zip(rates, skips, strict=True)):
            weights, gradients, exp_avgs, exp_avg_sqs = ([tensor[row] for tensor in lists] for lists in row_lists)
            fused_adamw(
                (weights, gradients, exp_avgs, exp_avg_sqs),
                [step[row] for step in steps],
                rate,
                group["betas"],
                group["eps"],
                weight_decay,
                skip=skip,  # the kernel's own switch: 1 leaves everything as it is
                grad_scale=self.grad_scale,
            )


def with_betas(param_groups: list[Group], beta1: float, beta2: float) -> list[Group]:
    """The groups with `betas`, torch's name, from their own beta1 and beta2 or the given ones."""
    groups = []
    for group in param_groups:
        own = {k: v for k, v in group.items() if k not in ("beta1", "beta2")}
        groups.append({**own, "betas": (group.get("beta1", beta1), group.get("beta2", beta2))})
    return groups


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """Make the state of a stacked parameter: moments like it, and a step count for each of its experts on any rank."""
    return {
        "step": torch.zeros(parameter.shape[0], dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
