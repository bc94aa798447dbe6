"""Device meshes, from the degrees of [parallelism].

Every process of a replica has tokens of its own: whole sequences with data parallelism, parts of them with context
and tensor parallelism. So every parameter that is not shared out over an axis of its own is sharded over all
processes of a replica. The same processes are seen as `efsdp` x `ep` for experts, which are shared out over `ep` and
each share sharded over `efsdp`, and as `tfsdp` x `tp` for the matrices of attention and dense layers.
Neighbouring ranks are of one `tp`, then of one `cp` axis.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Degrees(NamedTuple):
    """Sizes of the axes; replicate * per_replica is the number of processes, and expert divides per_replica."""

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def per_replica(self) -> int:
        """Processes of a replica of the model."""
        return self.shard * self.context * self.tensor

    @property
    def per_sequence(self) -> int:
        """Processes that have a part of the same sequences."""
        return self.context * self.tensor

    @property
    def data(self) -> int:
        """How many times different sequences are read."""
        return self.replicate * self.shard


class Meshes(NamedTuple):
    """The same processes as meshes, for parameters of different kinds and for parts of sequences."""

    dense: DeviceMesh  # dp_shard, or dp_replicate x dp_shard: all processes
    ep: DeviceMesh | None = None  # ep, the axis that the experts are shared out over
    efsdp: DeviceMesh | None = (
        None  # efsdp, or dp_replicate x efsdp: the axes that a share of the experts is sharded over
    )
    tp: DeviceMesh | None = None  # tp, the axis that matrices are shared out over
    tfsdp: DeviceMesh | None = None  # tfsdp, or dp_replicate x tfsdp: the axes that a share of them is sharded over
    cp: DeviceMesh | None = None  # cp, the axis over which attention has to look at all of a sequence
    sequence: DeviceMesh | None = None  # processes that have parts of the same sequences: cp x tp

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The processes that have parts of the same sequences; None where each has whole ones."""
        return None if self.sequence is None else self.sequence.get_group()


def resolve_degrees(
    *,
    world_size: int,
    replicate: int,
    shard: int,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    num_experts: int = 0,
) -> Degrees:
    """Fill in a shard degree of -1 (the rest of the world); ValueError for degrees that do not fit together.

    With expert parallelism every process of a replica keeps whole experts, so the number of these must divide theirs:
    matrix optimizers then need no communication.
    """
    if shard == -1:
        shard = max(1, world_size // (replicate * context * tensor))
    degrees = Degrees(replicate, shard, expert, context, tensor)
    if replicate * degrees.per_replica != world_size:
        names = f"data_parallel_replicate_degree ({replicate}) x {_per_replica(degrees)}"
        raise ValueError(
            f"{names} must equal the number of processes ({world_size}): change the degrees or torchrun's "
            "--nproc_per_node"
        )
    if expert > 1:
        name, processes = f"parallelism.expert_parallel_degree ({expert})", _per_replica(degrees)
        if not num_experts:
            raise ValueError(f"{name} needs experts, but moe.num_experts is 0: set it to 1")
        if num_experts % expert:
            raise ValueError(f"{name} must divide moe.num_experts ({num_experts})")
        if degrees.per_replica % expert:
            raise ValueError(f"{name} must divide {processes}, whose processes share out the experts")
        if num_experts % degrees.per_replica:
            raise ValueError(
                f"{name}: {processes} must divide moe.num_experts ({num_experts}), so that "
                "processes hold whole experts: raise data_parallel_replicate_degree"
            )
    return degrees


def _per_replica(degrees: Degrees) -> str:
    names = f"data_parallel_shard_degree ({degrees.shard})"
    names += f" x context_parallel_degree ({degrees.context})" if degrees.context > 1 else ""
    return names + (f" x tensor_parallel_degree ({degrees.tensor})" if degrees.tensor > 1 else "")


def build_mesh(
    *, device: torch.device, shard: int, replicate: int = 1, expert: int = 1, context: int = 1, tensor: int = 1
) -> Meshes:
    """Build the meshes over all processes, of degrees as `resolve_degrees` gives them."""

    def mesh(**axes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def shared_out(axis: str, degree: int, rest: str) -> tuple[DeviceMesh, DeviceMesh]:
        """`axis`, and the axes that what is shared out over it is sharded over."""
        if replicate == 1:
            both = mesh(**{rest: degrees.per_replica // degree, axis: degree})
            return both[axis], both[rest]
        both = mesh(dp_replicate=replicate, **{rest: degrees.per_replica // degree, axis: degree})
        return both[axis], both["dp_replicate", rest]

    degrees = Degrees(replicate, shard, expert, context, tensor)
    shards = {"dp_shard": degrees.per_replica}
    meshes = Meshes(mesh(**shards) if replicate == 1 else mesh(dp_replicate=replicate, **shards))
    if expert > 1:
        ep, efsdp = shared_out("ep", expert, "efsdp")
        meshes = meshes._replace(ep=ep, efsdp=efsdp)
    if tensor > 1:
        tp, tfsdp = shared_out("tp", tensor, "tfsdp")
        meshes = meshes._replace(tp=tp, tfsdp=tfsdp, sequence=tp)
    if context > 1:
        cp = mesh(dp=degrees.data, cp=context, tp=tensor)["cp"]
        meshes = meshes._replace(cp=cp, sequence=cp)
    if context > 1 and tensor > 1:
        meshes = meshes._replace(sequence=mesh(dp=degrees.data, sequence=degrees.per_sequence)["sequence"])
    return meshes
