"""Norms over meshes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titan_moe.norms import norms


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _num_copies(tensor: Tensor) -> int:
    """How many processes hold the same part of `tensor` as this one does."""
    if not isinstance(tensor, DTensor):
        return _num_ranks()
    mesh, copies = tensor.device_mesh, 1
    for axis, placement in enumerate(tensor.placements):
        copies *= mesh.size(axis) if isinstance(placement, Replicate) else 1
    return copies


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over all elements of tensors of any meshes; a plain scalar, the same on every rank.

    Each rank sums the squares of its parts, over how many ranks hold the same, so that one collective does for all
    meshes. The squares are in float64: the sum is right to 1e-6, and those of large fp32 norms don't overflow.
    """
    parts: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(_num_copies(tensor), []).append(_local(tensor))
    square = torch.stack([norms(part).square().sum() / n for n, part in parts.items()]).sum()
    if _num_ranks() > 1:
        dist.all_reduce(square)
    return square.sqrt().float()


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the gradients, a scalar, the single process's whatever the layout, up to round-off."""
    return total_norm(p.grad for p in parameters if p.grad is not None)


def param_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the parameters, a scalar (the paper's Figure 4)."""
    return total_norm(parameters)
