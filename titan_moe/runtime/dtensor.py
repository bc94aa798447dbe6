"""Local parts of DTensors, and DTensors of local parts. A plain tensor is whole on every rank."""

import itertools

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)

Slices = tuple[slice, ...]  # a box of a tensor, by dim


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without its gradient; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_slices(tensor: Tensor) -> Slices:
    """Which indices of each dim of the whole tensor this rank holds; all of them of a plain tensor. No collective."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    return _box(*compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements))


def slices_by_rank(tensor: DTensor) -> dict[int, Slices]:
    """As `local_slices`, of every rank of the tensor's mesh."""
    mesh = tensor.device_mesh.mesh
    places = [list(place) for place in itertools.product(*map(range, mesh.shape))]
    return {
        int(mesh[tuple(place)]): _box(
            *_compute_local_shape_and_global_offset(tensor.shape, mesh.shape, place, tensor.placements)
        )
        for place in places
    }


def _box(shape: tuple[int, ...], offset: tuple[int, ...]) -> Slices:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local_rows(tensor: Tensor) -> slice:
    """Which indices of dim 0 (experts) this rank holds."""
    return local_slices(tensor)[0]


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks that hold a part; a collective for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part, a view, of the tensor `whole` that every rank has, cut as `parameter` is."""
    return whole[local_slices(parameter)]


def sharded_like(rows: Tensor, parameter: DTensor) -> DTensor:
    """The DTensor whose local part is `rows` (R, ...), sharded on dim 0 as `parameter` is; no collective."""
    shape = torch.Size((parameter.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()  # with neither, torch takes all shards to be of one size
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def mesh_of_one(rank: int, device: str) -> DeviceMesh:
    """The mesh of one rank, by its number among all processes; without a group, because it has nobody to talk to."""
    return DeviceMesh(device, [rank], _init_backend=False)


def held_by_one(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """The tensor that the rank of a mesh of one has, and of which all others keep the shape only.

    DCP saves and loads such a tensor on the ranks of its mesh alone.
    """
    part = value if mesh.get_coordinate() is not None else value.new_empty(0)
    return DTensor.from_local(part, mesh, [Replicate()], run_check=False, shape=value.shape, stride=value.stride())


def wrapped_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which `part` is what this rank holds, cut as `parameter` is; no collective."""
    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
