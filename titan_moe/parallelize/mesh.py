"""Device meshes, from the degrees of [parallelism].

Every rank of a replica has tokens of its own: whole sequences with data parallelism, parts of them with context and
tensor parallelism. So a parameter that neither expert nor tensor parallelism cuts is sharded over all ranks of a
replica. For those that are cut the same ranks are seen as two axes, one that cuts them and the rest, over which FSDP2
shards what each rank has then: `efsdp` x `ep` for experts, `tfsdp` x `tp` for matrices of attention and dense layers.
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
    """The same ranks as meshes, for parameters of different kinds and for parts of sequences."""

    dense: DeviceMesh  # dp_shard, or dp_replicate x dp_shard: all ranks
    ep: DeviceMesh | None = None  # the axis over which experts are cut
    efsdp: DeviceMesh | None = None  # efsdp, or dp_replicate x efsdp: over which FSDP2 shards them then
    tp: DeviceMesh | None = None  # the axis over which matrices are cut
    tfsdp: DeviceMesh | None = None  # tfsdp, or dp_replicate x tfsdp: over which FSDP2 shards them then
    cp: DeviceMesh | None = None  # the axis over which attention has to look at all of a sequence
    sequence: DeviceMesh | None = None  # ranks that have parts of the same sequences: cp x tp

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that have parts of the same sequences; None where each has whole ones."""
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

    # The product has no `ep`: it is made of ranks of the other axes.
    if replicate * degrees.per_replica != world_size:
        names = f"data_parallel_replicate_degree ({replicate}) x {_per_replica(degrees)}"
        raise ValueError(
            f"{names} must equal the number of processes ({world_size}): change the degrees or torchrun's "
            "--nproc_per_node"
        )

    # Experts are cut twice on their first dim, by `ep` and by FSDP2, and must come out whole.
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

    def cut_axis(axis: str, degree: int, rest: str) -> tuple[DeviceMesh, DeviceMesh]:
        """The axis that cuts a kind of parameters, innermost; and the axes over which FSDP2 shards them then."""
        axes = {rest: degrees.per_replica // degree, axis: degree}
        if replicate == 1:
            both = mesh(**axes)
            return both[axis], both[rest]
        all_three = mesh(dp_replicate=replicate, **axes)
        return all_three[axis], all_three["dp_replicate", rest]

    degrees = Degrees(replicate, shard, expert, context, tensor)
    dense = {"dp_shard": degrees.per_replica}
    meshes = Meshes(mesh(**dense) if replicate == 1 else mesh(dp_replicate=replicate, **dense))
    if expert > 1:
        ep, efsdp = cut_axis("ep", expert, "efsdp")
        meshes = meshes._replace(ep=ep, efsdp=efsdp)

    # Neighbours have parts of one sequence: `tp` is the innermost axis, `cp` the next.
    if tensor > 1:
        tp, tfsdp = cut_axis("tp", tensor, "tfsdp")
        meshes = meshes._replace(tp=tp, tfsdp=tfsdp, sequence=tp)
    if context > 1:
        cp = mesh(dp=degrees.data, cp=context, tp=tensor)["cp"]
        meshes = meshes._replace(cp=cp, sequence=cp)
    if context > 1 and tensor > 1:
        meshes = meshes._replace(sequence=mesh(dp=degrees.data, sequence=degrees.per_sequence)["sequence"])
    return meshes
