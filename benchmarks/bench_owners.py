"""Updates of sharded dense matrices: time, bytes sent and state of a rank, on one process and on several.

    python benchmarks/bench_owners.py                                  # Muon on 1, 2 and 4 gloo processes, FSDP2
    python benchmarks/bench_owners.py --optimizer soap --ranks 1 2

Every process has one thread. Only `optimizer.step` is measured, on the same gradients, fp32. A round has a step of each
number of processes, one after the other; tables have the least of all rounds, as other programs only add.
`wall` is the slowest rank's time by the clock, `processor` the largest processor time of a rank, in which waiting and
other programs are not.
"""

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.optimizer import Optimizer, combine
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.runtime.dtensor import local

SIZES = {"dim": 512, "num_layers": 4, "num_heads": 8, "ffn_dim": 1536, "vocab_size": 256}
WARMUP = 2


class Spent(NamedTuple):
    """Seconds of a step, and the bytes that the process sent to others."""

    wall: float
    processor: float
    sent: int


class Sent(TorchDispatchMode):
    """Count the bytes that leave this process, of all-gathers as in a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do, and count."""
        # An operator of a DTensor runs one of its local tensor, which comes here again and is counted then.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name, ranks = func._overloadpacket.__name__, dist.get_world_size() if dist.is_initialized() else 1
        if name == "alltoall_base_":
            self.bytes += (sum(args[4]) - args[4][dist.get_rank()]) * args[1].element_size()
        elif name == "all_gather_into_tensor":
            self.bytes += args[0].numel() * args[0].element_size() * (ranks - 1)
        elif func.namespace in ("c10d", "_c10d_functional"):
            assert name in ("wait_tensor", "_wrap_tensor_autograd"), f"{func} is not counted"
        return result


def build(optimizer: str) -> tuple[Transformer, Optimizer]:
    """A dense model as a run builds it, sharded over all processes, with gradients; its states are made already."""
    with torch.device("meta"):
        model = Transformer(**SIZES, num_experts=0, router=None)
    if dist.is_initialized():
        mesh = build_mesh(device=torch.device("cpu"), shard=dist.get_world_size())
        fp32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
        parallelize(model, mesh=mesh, **fp32, checkpoint_mode="none", compile_blocks=False)
    model.to_empty(device="cpu")
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()  # any will do

    arguments = {"matmul_dtype": "float32"} if optimizer == "muon" else {}
    groups = parameter_groups(model.named_parameters(), {"dense": arguments})
    names = {group["name"]: optimizer if group["name"] == "dense" else "adamw" for group in groups}
    return model, combine(groups, names, lambda name, chosen: OPTIMIZERS[name](chosen, lr=1e-4))


def step(optimizer: Optimizer) -> Spent:
    """Measure a step; the processes begin together."""
    if dist.is_initialized():
        dist.barrier()
    finite = torch.ones((), dtype=torch.bool)
    with Sent() as sent:
        wall, processor = time.perf_counter(), time.process_time()
        optimizer.step(finite=finite)
        return Spent(time.perf_counter() - wall, time.process_time() - processor, sent.bytes)


def serve(rank: int, world: int, folder: str, optimizer_name: str, pipe: Connection) -> None:
    """Be one of the processes of a group: send the bytes of its state, then make a step whenever asked."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    _, optimizer = build(optimizer_name)
    for _ in range(WARMUP):
        step(optimizer)
    pipe.send(sum(local(value).nbytes for state in optimizer.state.values() for value in state.values()))
    while pipe.recv():
        pipe.send(step(optimizer))
    if world > 1:
        dist.destroy_process_group()


def show(rounds: list[dict[int, Spent]], state: dict[int, int]) -> None:
    """Print the least of all rounds, also over that of the first number of processes."""
    print("| processes | wall, ms | ratio | processor, ms | ratio | sent, MiB | state, MiB |\n" + "|---" * 7 + "|")
    least = {world: [min(times) for times in zip(*(r[world] for r in rounds), strict=True)] for world in state}
    wall_of_first, processor_of_first, _ = least[next(iter(state))]
    for world, (wall, processor, sent) in least.items():
        times = f"{1000 * wall:.0f} | {wall / wall_of_first:.2f} | {1000 * processor:.0f} | "
        times += f"{processor / processor_of_first:.2f}"
        print(f"| {world} | {times} | {sent / 2**20:.1f} | {state[world] / 2**20:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    # the groups of all sizes live at once, and only one of them works at a time
    context, pipes = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.ranks:
            ends = [context.Pipe() for _ in range(world)]
            for rank, (_, theirs) in enumerate(ends):
                given = (rank, world, folder, arguments.optimizer, theirs)
                context.Process(target=serve, args=given, daemon=True).start()
                theirs.close()  # so that the end of a process is the end of its pipe
            pipes[world] = [ours for ours, _ in ends]
        state = {world: max(pipe.recv() for pipe in pipes[world]) for world in pipes}

        rounds: list[dict[int, Spent]] = []
        for _ in range(arguments.rounds):
            of_round = {}
            for world, own in pipes.items():
                for pipe in own:
                    pipe.send(True)
                of_round[world] = Spent(*map(max, zip(*(pipe.recv() for pipe in own), strict=True)))
            rounds.append(of_round)

        show(rounds, state)
        for own in pipes.values():
            for pipe in own:
                pipe.send(False)
        for process in multiprocessing.active_children():
            process.join()


if __name__ == "__main__":
    main()
