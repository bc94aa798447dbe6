"""The processes that train together: rank and world size, their group and its few collectives, seeds."""

import datetime
import hashlib
import logging
import os
import random
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_moe.runtime import compat
from titan_moe.runtime.errors import describe

logger = logging.getLogger("titan_moe")
T = TypeVar("T")


class Runtime(NamedTuple):
    """This process' place in the world, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1  # processes of this node

    @property
    def is_main(self) -> bool:
        """Whether this process writes the metrics and speaks to the user."""
        return self.rank == 0


def read_world() -> Runtime:
    """Rank, world size and device as torchrun set them; one process when it did not."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(*item)) for item in names.items())
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Runtime(rank, world_size, local_rank, device, local_world_size)


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh; where it has several axes, and not all processes, call it on all of them."""
    if mesh.size() == world_size():
        group = dist.group.WORLD
        assert group is not None
        return group
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of `group` (None: over all), in place; unchanged when there is one process."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest over all ranks of each number, in place; unchanged when there is one process."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


# At its own limit torch ends a process with pages of stacks. `watch` ends it with one line, so much earlier.
GRACE_SECONDS = 60


def init_process_group(runtime: Runtime, timeout_seconds: int) -> None:
    """Start the default process group: gloo on a CPU, NCCL (with gloo for CPU tensors) on GPUs."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder's last collectives
    backend = "cuda:nccl,cpu:gloo" if runtime.device.type == "cuda" else "gloo"
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    timeout = datetime.timedelta(seconds=timeout_seconds + GRACE_SECONDS)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def close_process_group() -> None:
    """Take the process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(timeout_seconds: int) -> None:
    """Change the timeout of the collectives of every group: training has another one than its start."""
    if world_size() > 1:
        for group in list(dist.distributed_c10d._world.pg_map):
            compat.set_group_timeout(datetime.timedelta(seconds=timeout_seconds + GRACE_SECONDS), group)


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """Give every process the small Python value of each."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(task: Callable[[], object], runtime: Runtime) -> None:
    """Run `task` on the main process; ValueError on every process where it raises ValueError or OSError there."""
    # All processes wait for the result. Were it only the main one that raised, the others would hang.
    text, failure = None, None
    if runtime.is_main:
        try:
            task()
        except (ValueError, OSError) as error:
            text, failure = describe(error), error
    text = all_gather(text)[0]
    if text is not None:
        raise ValueError(text) from failure


def caution_restarts() -> None:
    """Warn where torchrun would restart workers with the store of the first start: such restarts fail or hang."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        logger.warning(
            "torchrun --max_restarts %d: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started, "
            "or a restart can fail or hang",
            restarts,
        )


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python's, NumPy's and torch's generators; with `deterministic`, refuse kernels that are not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling costs a pass over all memory that is allocated, and no code here reads what it has not written.
        torch._C._set_deterministic_fill_uninitialized_memory(False)
        torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one training step, so that what it draws does not depend on the steps before it."""
    torch.manual_seed(seed_of(f"{seed}/{step}/{rank}"))


def seed_of(key: str) -> int:
    """A seed for torch's generators, 63 bits, from `key` alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
