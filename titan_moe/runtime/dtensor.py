"""Local parts of DTensors, and DTensors of local parts. A plain tensor is whole on every rank."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without its gradient; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def rows(tensor: Tensor) -> slice:
    """The indices of dim 0 (experts) that this rank holds: all, unless the tensor is a DTensor sharded on dim 0."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return slice(offset[0], offset[0] + shape[0])
    return slice(0, tensor.shape[0])


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks that hold a part; a collective for a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `whole`, which every rank has, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def sharded_like(rows: Tensor, parameter: DTensor) -> DTensor:
    """The DTensor whose local part is `rows`, sharded on dim 0 as `parameter` is; no collective."""
    shape = torch.Size((parameter.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
