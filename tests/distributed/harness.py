"""Run a function on several gloo processes and bring back what it returns.

The processes are forked from one that has imported torch and this package: importing them takes seconds in each.
"""

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "titan_moe.parallelize.parallelize",
        "titan_moe.job",
        "tests.invariance",
    ]
)


def _worker(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        result = function(rank, world, *args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(rank, world, *args) on `world` processes; the results by rank. `function` is a module's own."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (world, folder, function, args), nprocs=world, start_method="forkserver")
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world)]
