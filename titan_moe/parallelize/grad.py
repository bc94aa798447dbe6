"""Norms over meshes."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titan_moe.norms import norms
from titan_moe.runtime.dtensor import local
from titan_moe.runtime.world import all_reduce_sum, world_size


def _num_copies(tensor: Tensor) -> int:
    """How many processes hold the same part of `tensor` as this one does."""
    if not isinstance(tensor, DTensor):
        return world_size()
    mesh, copies = tensor.device_mesh, 1
    for axis, placement in enumerate(tensor.placements):
        copies *= mesh.size(axis) if isinstance(placement, Replicate) else 1
    return copies


class Squares(NamedTuple):
    """Of each of P tensors by name the sum of its squares, over all ranks and the same on each."""

    places: dict[str, int]  # where a tensor's sum is in `values`, in the order in which the tensors were given
    values: Tensor  # (P,) float64

    def norm(self) -> Tensor:
        """The 2-norm over all elements, a scalar."""
        return self.values.sum().sqrt().float()

    def nonfinite(self) -> list[str]:
        """The tensors that hold a NaN or an infinity; this waits for the device."""
        finite = self.values.isfinite().tolist()
        return [name for name, place in self.places.items() if not finite[place]]


@torch.no_grad()
def square_sums(tensors: Mapping[str, Tensor]) -> Squares:
    """The sums of squares of tensors of any meshes.

    Each rank sums the squares of its parts, over how many ranks hold the same, so that one collective does for all
    meshes. The squares are in float64: the sum is right to 1e-6, and those of large fp32 norms don't overflow.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(_num_copies(tensor), {})[name] = local(tensor)
    sums = [norms(list(part.values())).square() / n for n, part in parts.items()]
    values = all_reduce_sum(torch.cat(sums))
    summed = {name: place for place, name in enumerate(name for part in parts.values() for name in part)}
    return Squares({name: summed[name] for name in tensors}, values)


def grad_squares(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Squares:
    """Of the gradients that there are: their norm is the single process's whatever the layout, up to round-off."""
    return square_sums({name: p.grad for name, p in named_parameters if p.grad is not None})


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over all elements of tensors of any meshes; a plain scalar, the same on every rank."""
    return square_sums({str(number): tensor for number, tensor in enumerate(tensors)}).norm()


def param_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the parameters, a scalar (the paper's Figure 4)."""
    return total_norm(parameters)
