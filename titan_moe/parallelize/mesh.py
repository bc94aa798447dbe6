"""The device mesh, from the degrees of [parallelism]."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def resolve_shard_degree(*, world_size: int, replicate: int, shard: int) -> int:
    """Fill in a shard degree of -1 (the rest of the world) and check that the degrees multiply to `world_size`."""
    if shard == -1:
        shard = max(1, world_size // replicate)
    if replicate * shard != world_size:
        raise ValueError(
            f"data_parallel_replicate_degree ({replicate}) x data_parallel_shard_degree ({shard}) must equal the "
            f"number of processes ({world_size}): change the degrees or torchrun's --nproc_per_node"
        )
    return shard


def build_mesh(*, device: torch.device, shard: int) -> DeviceMesh:
    """Build the data-parallel mesh, one axis `dp`, over all processes."""
    return init_device_mesh(device.type, (shard,), mesh_dim_names=("dp",))
