"""Run a function on several gloo processes and bring back what it returns."""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


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
        mp.spawn(_worker, (world, folder, function, args), nprocs=world)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world)]
