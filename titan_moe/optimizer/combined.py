"""Several optimizers as one: each parameter group is updated by the optimizer that it names."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from titan_moe.optimizer.load_lr import Group, load_groups, scale_steps, step_by_load
from titan_moe.optimizer.matrix import MatrixOptimizer
from titan_moe.runtime.dtensor import local


class Combined(Optimizer):
    """One optimizer to the rest of the code: one list of groups, one state, one step.

    `parts` are optimizers by name, whose groups say by `optimizer` which name is theirs. They keep no state of their
    own: after a state is loaded they share the new one.
    """

    def __init__(self, parts: Mapping[str, Optimizer], order: list[str]) -> None:
        self.parts = dict(parts)
        groups = {group["name"]: group for part in parts.values() for group in part.param_groups}
        super().__init__([groups[name] for name in order], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        for name, part in self.parts.items():
            groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.__setstate__({"state": self.state, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, load: Tensor | None = None) -> Any:
        """Take a step of every part; `load` (L, E) goes to the one whose group has load-based rates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            if load_groups(part):
                part.step(load=load)  # pyrefly: ignore[no-matching-overload]
            else:
                part.step()
        return loss


def combine(groups: list[Group], names: Mapping[str, str], build: Callable[[str, list[Group]], Optimizer]) -> Optimizer:
    """Build an optimizer over all groups, of which group g is updated by the optimizer called `names[g]`.

    `build(name, groups)` makes one of them. If all groups have the same, it is that one.
    """
    own: dict[str, list[Group]] = {}
    for group in groups:
        own.setdefault(names[group["name"]], []).append(group)
    if len(own) > 1:
        own = {name: [{**group, "optimizer": name} for group in members] for name, members in own.items()}
    parts = {name: build(name, members) for name, members in own.items()}
    for part in parts.values():
        if load_groups(part):
            scale_steps(part)
    return Combined(parts, [group["name"] for group in groups]) if len(parts) > 1 else next(iter(parts.values()))


def kind_of(optimizer: Optimizer) -> str:
    """What updates which groups, for checkpoints to compare: `AdamW`, or `AdamW (router, dense) + shampoo (expert)`."""
    if isinstance(optimizer, Combined):
        texts = []
        for part in optimizer.parts.values():
            members = ", ".join(group["name"] for group in part.param_groups)
            texts.append(f"{kind_of(part)} ({members})")
        return " + ".join(texts)
    return optimizer.kind if isinstance(optimizer, MatrixOptimizer) else type(optimizer).__name__


def describe_group(optimizer: Optimizer, group: Group) -> str:
    """How a group is updated, where it is not all by AdamW: `shampoo, but AdamW for 2 tensors (1,024 parameters)`."""
    if isinstance(optimizer, Combined):
        return describe_group(optimizer.parts[group["optimizer"]], group)
    if not isinstance(optimizer, MatrixOptimizer):
        return kind_of(optimizer)
    rest = [p for p in group["params"] if not optimizer.is_matrix(group, p)]
    if len(rest) == len(group["params"]):
        return f"AdamW (no matrices for {optimizer.kind})"
    if rest:
        count = sum(p.numel() for p in rest)
        return f"{optimizer.kind}, but AdamW for {len(rest)} tensors ({count:,} parameters)"
    return optimizer.kind


def optimizers_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that make up this one, or it alone."""
    return list(optimizer.parts.values()) if isinstance(optimizer, Combined) else [optimizer]


@torch.no_grad()
def clip_gradients(optimizer: Optimizer, norm: Tensor, max_norm: float) -> None:
    """Have the next step take gradients times min(1, max_norm / norm), `norm` being that of all; 0: as they are.

    torch's fused optimizers divide by a scale while they read the gradients, which saves a pass over memory: they are
    told by `grad_scale`, as torch.amp.GradScaler tells them. The gradients of others are scaled here, in place.
    """
    scale = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else None
    for part in optimizers_of(optimizer):
        if getattr(part, "_step_supports_amp_scaling", False):
            part.grad_scale = scale  # pyrefly: ignore[missing-attribute]
        elif scale is not None:
            gradients = [local(p.grad) for group in part.param_groups for p in group["params"] if p.grad is not None]
            if all(gradient.dtype == scale.dtype for gradient in gradients):
                torch._foreach_div_(gradients, scale)
            else:
                for gradient in gradients:
                    gradient.div_(scale.view(1))  # not a scalar, which a GPU rounds to the gradient's type first


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step changes nothing where its `found_inf` is 1, as torch's fused ones can, on the device.

    Not torch's SGD: it makes its first momentum of memory as it finds it, and leaves that so where it skips.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not isinstance(optimizer, torch.optim.SGD)


def may_step(optimizer: Optimizer, finite: Tensor) -> bool:
    """Have the next step change nothing where `finite`, a bool scalar, is false; whether to call it at all.

    Fused optimizers are told, as torch.amp.GradScaler tells them, and nothing is read on the host. Others would take a
    NaN: for the sake of one of them `finite` is read, and the step of all is to be left out where it is false.
    """
    parts = optimizers_of(optimizer)
    if all(skips_by_itself(part) for part in parts):
        for part in parts:
            part.found_inf = (~finite).float()  # pyrefly: ignore[missing-attribute]
        return True
    takes_it = bool(finite)
    for part in parts:
        if isinstance(part, MatrixOptimizer):
            part.known_finite = takes_it
    return takes_it


def step_if_finite(optimizer: Optimizer, load_LE: Tensor, finite: Tensor) -> Tensor | None:
    """Take the optimizer's step with these loads; where `finite`, a bool scalar, is false nothing changes.

    Returns the factors (L, E) of the experts' rates, where loads set them: 0 in a step that changes nothing.
    """
    factors_LE = step_by_load(optimizer, load_LE) if may_step(optimizer, finite) else None
    for part in optimizers_of(optimizer):
        if skips_by_itself(part):
            part.found_inf = None  # pyrefly: ignore[missing-attribute]
    if not load_groups(optimizer):
        return None
    zeros_LE = torch.zeros_like(load_LE, dtype=torch.float32)
    return zeros_LE if factors_LE is None else torch.where(finite, factors_LE, zeros_LE)
