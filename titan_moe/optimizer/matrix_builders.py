"""The optimizers of matrices by their arguments: shampoo, shampoo_fast, distributed_shampoo, soap, muon.

All of them update stacked experts one by one, dense matrices whole, and give what is no matrix, and embeddings and
norms, to AdamW. A group may carry any of the arguments as its own value.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from titan_moe.optimizer.adamw import with_betas
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.meta_shampoo import load_package, meta_direction
from titan_moe.optimizer.muon import StepSize, muon_direction
from titan_moe.optimizer.optimizer import MatrixOptimizer
from titan_moe.optimizer.shampoo import Grafting, shampoo_direction
from titan_moe.optimizer.soap import soap_direction
from titan_moe.optimizer.transform import Transform

MatmulDtype = Literal["float32", "bfloat16"]


def shampoo(
    param_groups: list[Group],
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    epsilon: float = 1e-12,
    exponent: float = 0.0,
    grafting: Grafting = "adamw",
    precondition_frequency: int = 100,
    start_preconditioning_step: int = -1,
    statistics_every: int = 1,
    max_preconditioner_dim: int = 1024,
    adamw_above: int = 8192,
    share_factors: bool = False,
    one_sided: bool = False,
    matmul_dtype: MatmulDtype = "float32",
    stagger_roots: bool = False,
) -> Optimizer:
    """Shampoo with AdamW's step size, each expert by itself; the paper's section 3.5 (Shi et al., 2023).

    Inverse roots (factor + epsilon)^-exponent are computed every `precondition_frequency` steps from
    `start_preconditioning_step` on (-1: the first of these), before it the step is AdamW's; exponent 0 is 1/4, and 1/2
    with `one_sided`, which keeps the factor of a matrix' shorter side alone. Factors see every `statistics_every`-th
    gradient. Matrices are cut into blocks of at most `max_preconditioner_dim`, with factors of their own, or with
    `share_factors` one for each row and each column of blocks; a matrix with a dimension above `adamw_above` is
    AdamW's. `stagger_roots` spreads the roots of different tensors evenly over the steps.
    """
    return _matrix_optimizer("shampoo", param_groups, locals())


def shampoo_fast(
    param_groups: list[Group],
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    epsilon: float = 1e-12,
    exponent: float = 0.0,
    grafting: Grafting = "adamw",
    precondition_frequency: int = 100,
    start_preconditioning_step: int = -1,
    statistics_every: int = 10,
    max_preconditioner_dim: int = 128,
    adamw_above: int = 8192,
    share_factors: bool = True,
    one_sided: bool = False,
    matmul_dtype: MatmulDtype = "float32",
    stagger_roots: bool = True,
) -> Optimizer:
    """The preset of shampoo that we recommend: shared factors of 128, statistics every 10 steps, roots staggered."""
    return _matrix_optimizer("shampoo_fast", param_groups, locals())


def distributed_shampoo(
    param_groups: list[Group],
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    epsilon: float = 1e-12,
    exponent: float = 0.0,
    grafting: Grafting = "adamw",
    precondition_frequency: int = 100,
    start_preconditioning_step: int = -1,
    max_preconditioner_dim: int = 1024,
    adamw_above: int = 8192,
) -> Optimizer:
    """Meta's Distributed Shampoo, each expert by itself; its package must be installed. Arguments are shampoo's.

    `start_preconditioning_step` must be at least `precondition_frequency`.
    """
    load_package()
    return _matrix_optimizer("distributed_shampoo", param_groups, locals())


def soap(
    param_groups: list[Group],
    *,
    lr: float = 1e-3,
    beta1: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    precondition_frequency: int = 10,
    statistics_every: int = 1,
    max_preconditioner_dim: int = 1024,
    adamw_above: int = 8192,
    one_sided: bool = False,
    matmul_dtype: MatmulDtype = "float32",
    stagger_roots: bool = False,
) -> Optimizer:
    """SOAP, Adam in the eigenbasis of Shampoo's factors, each expert by itself (Vyas et al., 2024).

    The bases follow the factors every `precondition_frequency` steps by one step of orthogonal iteration; the other
    arguments are shampoo's.
    """
    return _matrix_optimizer("soap", param_groups, locals())


def muon(
    param_groups: list[Group],
    *,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: StepSize = "match_rms_adamw",
    weight_decay: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    matmul_dtype: MatmulDtype = "bfloat16",
) -> Optimizer:
    """Muon, orthogonalized momentum, each expert by itself (Jordan et al., 2024).

    `adjust_lr` "match_rms_adamw" takes AdamW's learning rate and decay (Liu et al., 2025), "original" is Jordan's
    scale. beta1, beta2 and eps are those of AdamW, for what is no matrix.
    """
    return _matrix_optimizer("muon", param_groups, locals())


def _shampoo_of(group: Group, offset: int) -> Transform:
    return _from_group(shampoo_direction, group, beta1=group["betas"][0], beta2=group["betas"][1], offset=offset)


def _meta_of(group: Group, offset: int) -> Transform:
    return meta_direction(group)


def _soap_of(group: Group, offset: int) -> Transform:
    return _from_group(soap_direction, group, beta1=group["betas"][0], beta2=group["betas"][1], offset=offset)


def _muon_of(group: Group, offset: int) -> Transform:
    return _from_group(muon_direction, group, beta=group["momentum"])


DIRECTIONS: dict[str, Callable[[Group, int], Transform]] = {
    "shampoo": _shampoo_of,
    "shampoo_fast": _shampoo_of,
    "distributed_shampoo": _meta_of,
    "soap": _soap_of,
    "muon": _muon_of,
}


def _from_group(direction: Callable[..., Transform], group: Group, **given: Any) -> Transform:
    """Call a transform's maker with those settings of a group that it takes."""
    names = inspect.signature(direction).parameters.keys() - given.keys()
    return direction(**given, **{name: group[name] for name in names})


def _matrix_optimizer(kind: str, param_groups: list[Group], arguments: dict[str, Any]) -> Optimizer:
    """Build the optimizer from a builder's arguments, `locals()` of it."""
    defaults = {k: v for k, v in arguments.items() if k not in ("param_groups", "beta1", "beta2")}
    groups = with_betas(param_groups, arguments["beta1"], arguments["beta2"])
    return MatrixOptimizer(kind, groups, defaults, make=DIRECTIONS[kind], period=_period, fits=_fits)


def _period(group: Group) -> int:
    """Over how many steps the roots of a group's tensors are spread."""
    return group["precondition_frequency"] if group.get("stagger_roots") else 0


def _fits(group: Group, parameter: Tensor) -> bool:
    return max(parameter.shape[-2:]) <= group.get("adamw_above", float("inf"))
