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

from titan_moe.optimizer.shampoo import Grafting
from titan_moe.optimizer.transform import State, Tick, Transform, keep_dead_rows

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


def distributed_shampoo(
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    epsilon: float = 1e-12,
    exponent: float = 0.0,
    grafting: Grafting = "adamw",
    precondition_frequency: int = 100,
    start_preconditioning_step: int = -1,
    max_preconditioner_dim: int = 1024,
    adamw_above: int = 8192,
) -> Transform:
    """Meta's Distributed Shampoo, each expert by itself; its package must be installed. Arguments are shampoo's.

    `start_preconditioning_step` must be at least `precondition_frequency`.

    The state of a row is in the package's tensors, which it only ever changes in place. They are made to lie in the
    rows of the transform's state, so that this is sharded, saved and loaded as that of any other transform.
    """
    package = load_package()
    grafting_config = package.AdamPreconditionerConfig(beta2=beta2, epsilon=eps) if grafting == "adamw" else None
    override = {2: exponent} if exponent else {}
    optimizers: list[torch.optim.Optimizer] = []  # the package's, once it is made at the first update

    def make(like: Tensor) -> torch.optim.Optimizer:
        """The package's optimizer on rows like those of (R, M, N), each a parameter of its own."""
        with torch.enable_grad():
            rows = [nn.Parameter(torch.zeros_like(row, dtype=torch.float32)) for row in like]  # R of (M, N)
        return package.DistributedShampoo(
            rows,
            lr=1.0,
            betas=(beta1, beta2),
            epsilon=epsilon,
            weight_decay=0.0,
            max_preconditioner_dim=max_preconditioner_dim,
            precondition_frequency=precondition_frequency,
            start_preconditioning_step=start_preconditioning_step,
            grafting_config=grafting_config,
            # its default of 1 would make a vector of a small matrix
            distributed_config=package.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
            preconditioner_config=package.RootInvShampooPreconditionerConfig(inverse_exponent_override=override),
        )

    def init(weight: Tensor) -> State:
        one = torch.zeros((1, *weight.shape[1:]), device=weight.device)  # even where this rank has no row
        (tensors,) = _tensors_of(make(one))
        return {name: tensor.expand(weight.shape[0], *tensor.shape).contiguous() for name, tensor in tensors.items()}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        # Its tensors are put into the rows of the state, which may be one that was loaded, and its count set to that of
        # the steps before; afterwards it counts by itself.
        if not optimizers:
            optimizers.append(make(gradient))
            for row, tensors in enumerate(_tensors_of(optimizers[0])):
                for name, tensor in tensors.items():
                    tensor.data = state[name][row]
            for parameter in optimizers[0].param_groups[0]["params"]:
                optimizers[0].state[parameter]["step"].fill_(tick.step - 1)
        rows = optimizers[0].param_groups[0]["params"]

        # the package can't leave a row out: what it did to those without a token is taken back
        before = {name: value.clone() for name, value in state.items()} if tick.alive is not None else {}
        for row, row_gradient in zip(rows, gradient, strict=True):
            row.grad = row_gradient.contiguous()
        optimizers[0].step()
        if tick.alive is not None:
            for name, old in before.items():
                keep_dead_rows(state[name], old, tick.alive)

        direction = -torch.stack([row.detach() for row in rows])  # (R, M, N)
        torch._foreach_zero_([row.detach() for row in rows])
        return direction

    return Transform(init, update, by_rows=False, max_dim=adamw_above, reads_weight=False)


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[State]:
    """The package's own tensors of each row, by a name made of their place in its state."""
    rows = []
    for parameter in optimizer.param_groups[0]["params"]:
        row: State = {}
        for block, state in optimizer.state[parameter].items():
            if block == "step":
                continue

            # moments are tensors of a block; factors and their roots are in an object of the package's own
            for name, value in state.items():
                if isinstance(value, Tensor):
                    row[f"{block}_{name}"] = value
                else:
                    factors = [(kind, getattr(value, kind)) for kind in ("factor_matrices", "inv_factor_matrices")]
                    row |= {f"{block}_{kind}_{i}": t for kind, tensors in factors for i, t in enumerate(tensors)}
        rows.append(row)
    return rows
