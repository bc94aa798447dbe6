"""Device meshes, from the degrees of [parallelism].

Every process is a data-parallel one: dense parameters are sharded over all processes of a replica. Expert parallelism
takes its axis out of these: the same processes, seen as `efsdp` x `ep`, share out the experts over `ep` and shard each
share over `efsdp`.
"""

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Degrees(NamedTuple):
    """Sizes of the axes; replicate * shard is the number of processes, and expert divides shard."""

    replicate: int = 1
    shard: int = 1
    expert: int = 1


class Meshes(NamedTuple):
    """The same processes as two meshes, for dense parameters and for experts."""

    dense: DeviceMesh  # dp_shard, or dp_replicate x dp_shard
    ep: DeviceMesh | None = None  # ep, the axis that the experts are shared out over
    efsdp: DeviceMesh | None = (
        None  # efsdp, or dp_replicate x efsdp: the axes that a share of the experts is sharded over
    )


def resolve_degrees(*, world_size: int, replicate: int, shard: int, expert: int = 1, num_experts: int = 0) -> Degrees:
    """Fill in a shard degree of -1 (the rest of the world); ValueError for degrees that do not fit together.

    With expert parallelism every process of a replica keeps whole experts, so the shard degree must divide their
    number: matrix optimizers then need no communication.
    """
    if shard == -1:
        shard = max(1, world_size // replicate)
    if replicate * shard != world_size:
        raise ValueError(
            f"data_parallel_replicate_degree ({replicate}) x data_parallel_shard_degree ({shard}) must equal the "
            f"number of processes ({world_size}): change the degrees or torchrun's --nproc_per_node"
        )
    if expert > 1:
        name = f"parallelism.expert_parallel_degree ({expert})"
        if not num_experts:
            raise ValueError(f"{name} needs experts, but moe.num_experts is 0: set it to 1")
        if num_experts % expert:
            raise ValueError(f"{name} must divide moe.num_experts ({num_experts})")
        if shard % expert:
            raise ValueError(
                f"{name} must divide data_parallel_shard_degree ({shard}), whose processes share out the experts"
            )
        if num_experts % shard:
            raise ValueError(
                f"{name}: data_parallel_shard_degree ({shard}) must divide moe.num_experts ({num_experts}), so that "
                "processes hold whole experts: raise data_parallel_replicate_degree"
            )
    return Degrees(replicate, shard, expert)


def build_mesh(*, device: torch.device, shard: int, replicate: int = 1, expert: int = 1) -> Meshes:
    """Build the meshes over all processes, of degrees as `resolve_degrees` gives them."""

    def mesh(**axes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    dense = mesh(dp_shard=shard) if replicate == 1 else mesh(dp_replicate=replicate, dp_shard=shard)
    if expert == 1:
        return Meshes(dense)
    if replicate == 1:
        sparse = mesh(efsdp=shard // expert, ep=expert)
        return Meshes(dense, sparse["ep"], sparse["efsdp"])
    sparse = mesh(dp_replicate=replicate, efsdp=shard // expert, ep=expert)
    return Meshes(dense, sparse["ep"], sparse["dp_replicate", "efsdp"])
