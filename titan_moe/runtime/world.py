"""The processes that train together: which one this is, sums over all, and seeds that are the same on each."""

import hashlib

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of `group` (None: over all), in place; unchanged when there is one process."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def seed_of(key: str) -> int:
    """A seed for torch's generators, 63 bits, from `key` alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
