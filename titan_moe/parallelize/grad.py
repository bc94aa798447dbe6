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
    """How many ranks hold the same part of `tensor` as this one does, itself included."""
    if not isinstance(tensor, DTensor):
        return world_size()
    mesh, num_copies = tensor.device_mesh, 1
    for axis, placement in enumerate(tensor.placements):
        num_copies *= mesh.size(axis) if isinstance(placement, Replicate) else 1
    return num_copies


class Squares(NamedTuple):
    """The sum of squares of each of P named tensors, over all ranks and the same on each."""

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

    Squares are in float64: the sum is right to 1e-6, and those of large fp32 norms don't overflow.
    """
    # One sum over all ranks does for all meshes: ranks that hold the same part each give it divided by their number.
    by_copies: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        by_copies.setdefault(_num_copies(tensor), {})[name] = local(tensor)
    sums = [norms(list(parts.values())).square() / copies for copies, parts in by_copies.items()]
    values_P = all_reduce_sum(torch.cat(sums))  # (P,)

    # The groups have put the tensors into another order than that in which they were given.
    names = [name for parts in by_copies.values() for name in parts]
    place_of = {name: place for place, name in enumerate(names)}
    return Squares({name: place_of[name] for name in tensors}, values_P)


def grad_squares(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Squares:
    """Of all gradients that there are: their norm is a single process's whatever the layout, up to round-off."""
    return square_sums({name: p.grad for name, p in named_parameters if p.grad is not None})


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over all elements of tensors of any meshes; a plain scalar, the same on every rank."""
    return square_sums({str(number): tensor for number, tensor in enumerate(tensors)}).norm()


def param_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the parameters, a scalar (the paper's Figure 4)."""
    return total_norm(parameters)
