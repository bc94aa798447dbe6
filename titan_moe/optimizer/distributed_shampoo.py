"""Meta's Distributed Shampoo (Shi et al., 2023) as a transform, where its package is installed.

Each expert's matrix is a parameter of its own for the package, so that it is preconditioned by itself whatever the
layout; left alone it would merge the experts of a stacked tensor, or cut its shards differently at each world size.
These parameters are zero before each step, at learning rate 1 and without decay, so that it leaves minus the direction.

Shapes: R rows (experts), M x N a matrix.
"""

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.transform import State, Tick, Transform

PACKAGE = "distributed_shampoo"


def load_package() -> Any:
    """Import Meta's package; ValueError with how to install it if it is not there."""
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ValueError(
            f"optimizer name = 'distributed_shampoo': Meta's package cannot be imported ({error}); "
            "pip install git+https://github.com/facebookresearch/optimizers, or take name = 'shampoo', which is ours"
        ) from error
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # it logs every group's settings
    return package


def meta_direction(group: Group) -> Transform:
    """Meta's optimizer on the rows of one parameter; its state is inside of it and not in the transform's."""
    rows: list[nn.Parameter] = []
    optimizers: list[torch.optim.Optimizer] = []

    def init(weight: Tensor) -> State:
        if weight.shape[0]:
            with torch.enable_grad():
                rows.extend(nn.Parameter(torch.zeros_like(row, dtype=torch.float32)) for row in weight)
            optimizers.append(_build(rows, group))
        return {}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        for row, own in zip(rows, gradient, strict=True):
            row.grad = own.contiguous()
        optimizers[0].step()
        direction = -torch.stack([row.detach() for row in rows])
        torch._foreach_zero_([row.detach() for row in rows])
        return direction

    return Transform(init, update)


def _build(rows: list[nn.Parameter], group: Group) -> torch.optim.Optimizer:
    package = load_package()
    beta1, beta2 = group["betas"]
    override = {2: group["exponent"]} if group["exponent"] else {}
    grafting = package.AdamPreconditionerConfig(beta2=beta2, epsilon=group["eps"])
    return package.DistributedShampoo(
        rows,
        lr=1.0,
        betas=(beta1, beta2),
        epsilon=group["epsilon"],
        weight_decay=0.0,
        max_preconditioner_dim=group["max_preconditioner_dim"],
        precondition_frequency=group["precondition_frequency"],
        start_preconditioning_step=group["start_preconditioning_step"],
        grafting_config=grafting if group["grafting"] == "adamw" else None,
        # its default of 1 would make a vector of a small matrix
        distributed_config=package.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        preconditioner_config=package.RootInvShampooPreconditionerConfig(inverse_exponent_override=override),
    )
