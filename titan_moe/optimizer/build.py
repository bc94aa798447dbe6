"""Optimizers by name: `OPTIMIZERS[name](param_groups, **arguments)` gives a torch.optim.Optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from titan_moe.optimizer.adamw import AdamW, with_betas
from titan_moe.optimizer.matrix_builders import distributed_shampoo, muon, shampoo, shampoo_fast, soap


def adamw(
    param_groups: list[dict[str, Any]],
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019), fused where torch has it; the paper's default.

    A group may carry any of the arguments as its own value.
    """
    return AdamW(with_betas(param_groups, beta1, beta2), lr=lr, eps=eps, weight_decay=weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, base_lrs: Sequence[float], factor: float) -> dict[str, float]:
    """Set each group's lr to its configured one, `base_lrs`, times the schedule's `factor`; return them by group."""
    for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base_lr * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "shampoo": shampoo,
    "shampoo_fast": shampoo_fast,
    "distributed_shampoo": distributed_shampoo,
    "soap": soap,
    "muon": muon,
}
