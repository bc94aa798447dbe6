"""Owners of sharded matrices: which rank updates which matrix, and how parts travel to it and back.

The direction of a dense matrix depends on all of it. So one rank, its owner, gets all parts, keeps the state, and sends
every rank the update of the part that it holds. Matrices are worked off in rounds, in each of which a rank owns at most
one, so that all ranks compute at once and a round is one collective each way.

Shapes: M x N a matrix.
"""

import functools
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from titan_moe.runtime.dtensor import Slices, mesh_of_one, slices_by_rank
from titan_moe.runtime.world import group_of_mesh


class Owned(NamedTuple):
    """Who updates a sharded matrix, in which round, and what each rank of its group holds. Ranks are the group's."""

    group: dist.ProcessGroup
    owner: int
    round: int
    parts: tuple[Slices, ...]  # by rank; replicas have the same
    senders: tuple[int, ...]  # ranks whose parts are the whole matrix, each element once
    home: DeviceMesh  # the owner alone, for the state

    @property
    def is_mine(self) -> bool:
        """Whether this rank is the owner."""
        return self.owner == self.group.rank()


class Transfer(NamedTuple):
    """A collective under way: wait for `work` before `received`, one piece after the other, is read."""

    work: dist.Work
    received: Tensor
    sent: Tensor  # must live until then


def assign(costs: Sequence[int], num_ranks: int) -> list[tuple[int, int]]:
    """The owner of each matrix by its cost, and the round in which it is updated: the owner's first, second, ...

    The dearest first, each to the rank with the least so far (Graham 1969: at most 4/3 of the best longest time). Ranks
    are then numbered by what they have: the first has most.
    """
    # on equal loads the rank with fewer matrices, so that there are few rounds
    loads = [(0, 0, rank) for rank in range(num_ranks)]  # cost, matrices, rank
    members: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, count, rank = heapq.heappop(loads)
        members[rank].append(index)
        heapq.heappush(loads, (load + costs[index], count + 1, rank))

    # whoever looks at rank 0 alone, as `estimate` does, sees the one that the others wait for
    by_load = sorted(loads, key=lambda entry: (-entry[0], entry[2]))
    owners = [(0, 0)] * len(costs)
    for owner, (_, _, rank) in enumerate(by_load):
        for number, index in enumerate(members[rank]):
            owners[index] = (owner, number)
    return owners


def cost(parameter: Tensor) -> int:
    """What an update of a matrix costs, up to a factor: a product of it with its smaller Gram matrix."""
    return parameter.numel() * min(parameter.shape)


def find_owners(matrices: Iterable[Tensor]) -> dict[Tensor, Owned]:
    """The owners of all those of `matrices`, the same on every rank, that are 2-D and that several ranks hold."""
    by_group: dict[dist.ProcessGroup, list[DTensor]] = {}
    for parameter in matrices:
        if isinstance(parameter, DTensor) and parameter.dim() == 2 and parameter.device_mesh.size() > 1:
            by_group.setdefault(group_of_mesh(parameter.device_mesh), []).append(parameter)

    # parts are alike for all matrices of one shape and layout, and there are few of these
    owners: dict[Tensor, Owned] = {}
    parts_of: dict[object, tuple[Slices, ...]] = {}
    for group, parameters in by_group.items():
        assigned = assign([cost(parameter) for parameter in parameters], group.size())
        for parameter, (owner, number) in zip(parameters, assigned, strict=True):
            ranks, mesh = dist.get_process_group_ranks(group), parameter.device_mesh
            layout = (parameter.shape, mesh, parameter.placements)
            if layout not in parts_of:
                by_rank = slices_by_rank(parameter)
                parts_of[layout] = tuple(by_rank[rank] for rank in ranks)
            senders = tuple(ranks.index(rank) for rank in one_replica(parameter, ranks[owner]))
            home = mesh_of_one(ranks[owner], mesh.device_type)
            owners[parameter] = Owned(group, owner, number, parts_of[layout], senders, home)
    return owners


def one_replica(tensor: DTensor, rank: int) -> list[int]:
    """The ranks that hold a whole tensor together with `rank`: its own replica, which may be on its node."""
    # of the axes with replicas only the place of `rank` is taken
    mesh = tensor.device_mesh.mesh
    place = (mesh == rank).nonzero()[0].tolist()
    index = tuple(
        at if isinstance(placement, Replicate) else slice(None)
        for at, placement in zip(place, tensor.placements, strict=True)
    )
    return sorted(mesh[index].flatten().tolist())


def gather(matrices: Sequence[tuple[Owned, Sequence[Tensor]]]) -> Transfer:
    """Send this rank's parts of the matrices of a round to their owners: of each its gradient, perhaps its weight."""
    pieces: dict[int, Sequence[Tensor]] = {}
    sizes: dict[int, int] = {}
    for owned, parts in matrices:
        if owned.group.rank() in owned.senders:
            pieces[owned.owner] = parts
        if owned.is_mine:
            sizes = {rank: len(parts) * size_of(owned.parts[rank]) for rank in owned.senders}
    tensors = [part for _, parts in matrices for part in parts]
    return exchange(matrices[0][0].group, pieces, sizes, tensors)


def join(owned: Owned, received: Tensor, count: int, shape: torch.Size) -> Tensor:
    """Put the parts that their owner has received together: (count, M, N), gradient and perhaps weight."""
    whole = received.new_empty(count, *shape)
    chunks = received.split([count * size_of(owned.parts[rank]) for rank in owned.senders])
    for rank, chunk in zip(owned.senders, chunks, strict=True):
        target = whole[(slice(None), *owned.parts[rank])]
        target.copy_(chunk.view(target.shape))
    return whole


def scatter(matrices: Sequence[tuple[Owned, Tensor | None]], like: Sequence[Tensor]) -> Transfer:
    """Send what the owners made of the matrices of a round, (M, N) there and None elsewhere, to all that hold parts."""
    pieces: dict[int, Sequence[Tensor]] = {}
    sizes: dict[int, int] = {}
    for owned, whole in matrices:
        sizes[owned.owner] = size_of(owned.parts[owned.group.rank()])
        if whole is not None:
            pieces = {rank: [whole[part]] for rank, part in enumerate(owned.parts)}
    return exchange(matrices[0][0].group, pieces, sizes, like)


def exchange(
    group: dist.ProcessGroup, pieces: Mapping[int, Sequence[Tensor]], sizes: Mapping[int, int], like: Sequence[Tensor]
) -> Transfer:
    """Begin to send `pieces` to ranks of a group, and to receive so many elements of ranks, in their order.

    They travel in the one type that holds all of `like`, tensors that are of the same types on every rank.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in like))
    ranks = range(group.size())
    flat = [piece.to(dtype).reshape(-1) for rank in ranks for piece in pieces.get(rank, ())]
    sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=like[0].device)
    input_sizes = [sum(piece.numel() for piece in pieces.get(rank, ())) for rank in ranks]
    output_sizes = [sizes.get(rank, 0) for rank in ranks]
    received = torch.empty(sum(output_sizes), dtype=dtype, device=sent.device)
    work = dist.all_to_all_single(received, sent, output_sizes, input_sizes, group, async_op=True)
    assert work is not None
    return Transfer(work, received, sent)


def size_of(part: Slices) -> int:
    """The number of elements of a part."""
    rows, columns = part
    return (rows.stop - rows.start) * (columns.stop - columns.start)
