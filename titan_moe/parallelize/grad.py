"""Gradients over meshes: the global norm and clipping."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group the parameters that have a gradient by the mesh it lives on: torch can't mix meshes in one foreach."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    return list(groups.values())


def total_norm(tensors: list[Tensor]) -> Tensor:
    """2-norm over all elements of tensors that live on one mesh; a plain scalar, the same on every rank."""
    norm = get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, check: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Scale gradients so that their global 2-norm is at most `max_norm` (0: leave them); return the norm before.

    Equals the single-process norm whatever the layout, up to round-off. `check` sees it before anything is scaled.
    """
    groups = _by_mesh(parameters)
    norms = [total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if check is not None:
        check(norm)
    if max_norm > 0:
        for group in groups:
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


@torch.no_grad()
def param_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the parameters, a scalar (the paper's Figure 4)."""
    groups: dict[object, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p.detach())
    return torch.linalg.vector_norm(torch.stack([total_norm(group) for group in groups.values()]))
