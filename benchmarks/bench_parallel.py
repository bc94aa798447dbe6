"""Two processes against one: speed, bytes that collectives move, and what dispatch takes of a MoE layer.

    python benchmarks/bench_parallel.py                       # everything, some minutes; it wants two free cores
    python benchmarks/bench_parallel.py --modes bytes         # needs no quiet machine

Every process has one thread, all have the same global batch, fp32, and talk over gloo. A step of two processes is
taken between two steps of one process, and compared with their mean; tables have medians. `wall` is the speed-up by the
clock, at most 2; `processor` is the processor time of both together over that of one: 1 where nothing is added. Neither
waiting nor other programs are in it. Bytes are counted at each collective as it runs: what a process sends to others,
and for all-to-alls also all that goes in.
"""

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.balancer import BALANCERS
from titan_moe.model.dispatch import combine_rows
from titan_moe.model.moe import MoE
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.parallelize.expert_parallel import apply_ep
from titan_moe.parallelize.mesh import Degrees, Meshes, build_mesh
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.step import train_step

DIM, LAYERS, VOCAB, SEQ, SEQUENCES, TOP_K, WARMUP, RANKS = 256, 4, 2048, 512, 8, 2, 2, 2
# number of experts, their width (of the dense layers: as wide as top_k experts), and degrees
CASES: dict[str, tuple[int, int, dict[str, int]]] = {
    "dense, FSDP2 2": (0, 512, {"shard": 2}),
    "8 experts, FSDP2 2": (8, 512, {"shard": 2}),
    "8 experts, EP 2": (8, 512, {"shard": 2, "expert": 2}),
    "64 experts, EP 2": (64, 256, {"shard": 2, "expert": 2}),
    "dense, TP 2": (0, 512, {"shard": 1, "tensor": 2}),
    "8 experts, TP 2": (8, 512, {"shard": 1, "tensor": 2}),
}


class Spent(NamedTuple):
    """What a task took of this process."""

    wall: float
    processor: float


def spent(task: Callable[[], Any]) -> Spent:
    """Time a task; the processes begin together."""
    if dist.is_initialized():
        dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    task()
    return Spent(time.perf_counter() - wall, time.process_time() - processor)


@functools.cache
def meshes(name: str) -> Meshes | None:
    """The case's meshes in a process of a group; None in one that is alone."""
    return build_mesh(device=torch.device("cpu"), **CASES[name][2]) if dist.is_initialized() else None


@functools.cache
def build(name: str) -> tuple[Transformer, Optimizer]:
    """The case's model and AdamW in this process."""
    num_experts, width, _ = CASES[name]
    with torch.device("meta"):
        model = Transformer(
            vocab_size=VOCAB,
            dim=DIM,
            num_layers=LAYERS,
            num_heads=4,
            ffn_dim=TOP_K * width,
            num_experts=num_experts,
            expert_dim=width,
            router=ROUTERS["topk_softmax"](top_k=TOP_K) if num_experts else None,
        )

    # As a run builds it: sharded without memory, then allocated and filled.
    fp32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    parallelize(model, mesh=meshes(name), **fp32, checkpoint_mode="none", compile_blocks=False)
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model, OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), {}), lr=1e-4)


def step(name: str, seed: int) -> None:
    """An optimizer step on this process's part of a random batch."""
    model, optimizer = build(name)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]  # (SEQUENCES, SEQ)

    # All processes draw the whole batch, and each takes the part that training's loader would give it.
    if dist.is_initialized():
        rank, degrees = dist.get_rank(), Degrees(**CASES[name][2])
        inputs, labels = (part.chunk(degrees.data)[rank // degrees.per_sequence] for part in (inputs, labels))
        positions = own_positions(SEQ, rank, degrees)
        if positions is not None:
            inputs, labels = inputs[:, positions], labels[:, positions]

    balancers = {"aux_loss": (0.1, BALANCERS["aux_loss"](coeff=1.0))} if CASES[name][0] else {}
    train_step(model, [(inputs, labels)], optimizer, balancers, model.expert_biases(), max_norm=1.0)


class Sent(TorchDispatchMode):
    """Count the bytes that leave this process in each kind of collective, sent as by a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do."""
        # An operator of a DTensor runs one of its local tensor, which comes here again and is counted then.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented

        # Of an all-to-all both are counted: all that goes in, and what is not for this process itself.
        name = func._overloadpacket.__name__.strip("_")
        if func.namespace == "_c10d_functional" and name == "all_to_all_single":
            rows, _, splits, _ = args
            whole = rows.numel() * rows.element_size()
            stays = splits[dist.get_rank()] if splits else len(rows) // RANKS
            self.bytes["all-to-all"] += whole
            self.bytes["all-to-all, to others"] += whole - whole * stays // max(1, len(rows))
        elif func.namespace == "c10d" and name in ("allgather_base", "reduce_scatter_base"):
            whole = max(t.numel() * t.element_size() for t in args[:2])
            self.bytes[name.removesuffix("_base")] += whole * (RANKS - 1) // RANKS
        elif func.namespace == "c10d" and name == "allreduce":
            self.bytes[name] += sum(2 * t.numel() * t.element_size() * (RANKS - 1) // RANKS for t in args[0])
        elif func.namespace in ("c10d", "_c10d_functional"):
            assert name in ("wait_tensor", "wrap_tensor_autograd"), f"{func} is not counted"
        return func(*args, **(kwargs or {}))


def count(name: str, seed: int) -> Counter[str]:
    """Bytes that this process sends in a step."""
    with Sent() as sent:
        step(name, seed)
    return sent.bytes


@functools.cache
def layer(name: str) -> MoE:
    """A MoE layer of its own."""
    num_experts, width, _ = CASES[name]
    route = ROUTERS["topk_softmax"](top_k=TOP_K)
    moe, mesh = MoE(dim=DIM, num_experts=num_experts, expert_dim=width, route=route), meshes(name)
    for index, parameter in enumerate(moe.parameters()):
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(index))
    if mesh is not None and mesh.ep is not None:
        apply_ep(moe, mesh.ep)
    return moe


def layer_times(name: str, seed: int) -> tuple[Spent, Spent]:
    """Forward and backward of a MoE layer, and of its dispatch and combine with experts that do nothing."""
    # Both have the same tokens and the same routing, and each its backward.
    moe = layer(name)
    parts = RANKS if dist.is_initialized() else 1
    x_BSD = torch.randn(SEQUENCES // parts, SEQ, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    upstream = torch.randn(x_BSD.shape)

    def whole() -> None:
        moe(x_BSD)[0].backward(upstream)
        moe.zero_grad()

    with torch.no_grad():
        routing = moe(x_BSD)[1]
    routing = routing._replace(topk_scores=routing.topk_scores.requires_grad_())

    def dispatch_and_combine() -> None:
        rows, _, permutation, state = moe.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        rows = moe.dispatcher.receive(rows, state)
        rows = moe.dispatcher.send_back(rows, state)
        combine_rows(rows, routing.topk_scores, permutation).backward(upstream.flatten(0, 1))

    return spent(whole), spent(dispatch_and_combine)


TASKS: dict[str, Callable[[str, int], Any]] = {
    "step": lambda name, seed: spent(lambda: step(name, seed)),
    "count": count,
    "layer": layer_times,
}


def serve(rank: int, folder: str, pipe: Connection) -> None:
    """Be one of the processes of a group: do what is asked for until there is nothing more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for task, name, seed in iter(pipe.recv, None):
        pipe.send(TASKS[task](name, seed))
    dist.destroy_process_group()


def ask(pipes: list[Connection], task: str, name: str, seed: int) -> list[Any]:
    """Let all processes of the group do something; their results."""
    for pipe in pipes:
        pipe.send((task, name, seed))
    return [pipe.recv() for pipe in pipes]


def scaling(pipes: list[Connection], cases: list[str], rounds: int) -> None:
    """Print two processes' steps against one's."""
    print("| model | one process, s | wall | processor |\n|---|---|---|---|")
    for name in cases:

        def alone(seed: int, name: str = name) -> Spent:
            return TASKS["step"](name, seed)

        # The step of two processes stands between two of one: what slows the machine for a while slows both.
        for seed in range(WARMUP):
            alone(seed), ask(pipes, "step", name, seed)
        before, rows = alone(0), []
        for seed in range(rounds):
            both, after = ask(pipes, "step", name, seed), alone(seed + 1)
            one = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
            wall, processor = max(two.wall for two in both), sum(two.processor for two in both)
            rows.append((one[0], one[0] / wall, processor / one[1]))
            before = after
        seconds, wall, processor = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {seconds:.3f} | {wall:.2f} | {processor:.3f} |", flush=True)
        build.cache_clear()


def bytes_sent(pipes: list[Connection], cases: list[str], rounds: int) -> None:
    """Print bytes that a rank sends in a step (not with TP), by its tokens, against the least that the layout needs."""
    print("| model | collective | bytes a token | least | ratio |\n|---|---|---|---|---|")
    tokens = SEQUENCES * SEQ // RANKS
    for name in (name for name in cases if "TP" not in name):
        num_experts, width, degrees = CASES[name]
        totals = [sum(ask(pipes, "count", name, seed), Counter()) for seed in range(rounds)]
        sent = {kind: sum(total[kind] for total in totals) / (rounds * RANKS * tokens) for kind in totals[0]}

        # The least is what FSDP2 has to gather (layers twice, the root once) and to reduce, and what tokens have to
        # travel.
        experts = 4 * LAYERS * 3 * num_experts * width * DIM
        layers, root = 4 * sum(p.numel() for p in build(name)[0].layers.parameters()), 4 * (VOCAB * DIM + DIM)
        travels = (RANKS - 1) / RANKS
        if degrees.get("expert"):
            layers -= experts  # they stay where they are
        least = {
            "allgather": travels * (2 * layers + root) / tokens,
            "reduce_scatter": travels * (layers + root) / tokens,
            "all-to-all": 2 * 2 * TOP_K * DIM * 4 * LAYERS,  # there and back, in forward and in backward
            # to others: as the router chooses; allreduce: losses, loads, the gradient norm
        }
        for kind, size in sorted(sent.items()):
            cells = f"{least[kind]:.2f} | {size / least[kind]:.4f}" if kind in least else "| "
            print(f"| {name} | {kind} | {size:.2f} | {cells} |", flush=True)
        build.cache_clear()


def dispatch(pipes: list[Connection], cases: list[str], rounds: int) -> None:
    """Print what dispatch and combine take of a MoE layer, forward and backward, by the clock and the processor."""
    print("| layer | processes | layer, ms | share, wall | share, processor |\n|---|---|---|---|---|")
    for name in (name for name in cases if "EP" in name):
        times: dict[int, list[tuple[float, float, float]]] = {1: [], RANKS: []}

        # One process is measured in the same round: its share says what dispatch takes without any sending.
        for seed in range(WARMUP + rounds):
            for processes, results in ((1, [layer_times(name, seed)]), (RANKS, ask(pipes, "layer", name, seed))):
                whole, part = ([max(r[i].wall for r in results), sum(r[i].processor for r in results)] for i in (0, 1))
                times[processes].append((1000 * whole[0], part[0] / whole[0], part[1] / whole[1]))
        for processes, rows in times.items():
            ms, wall, processor = (statistics.median(column) for column in zip(*rows[WARMUP:], strict=True))
            label = name.partition(",")[0]
            print(f"| {label} | {processes} | {ms:.1f} | {wall:.3f} | {processor:.3f} |", flush=True)


MODES = {"scaling": scaling, "bytes": bytes_sent, "dispatch": dispatch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    # The processes of the group live for all modes. This one is not of the group: it measures one process alone.
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(RANKS)]
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, theirs) in enumerate(ends):
            context.Process(target=serve, args=(rank, folder, theirs), daemon=True).start()
            theirs.close()  # so that the end of a process is the end of its pipe
        pipes = [ours for ours, _ in ends]
        for mode in arguments.modes:
            MODES[mode](pipes, arguments.cases, arguments.rounds if mode != "bytes" else 2)
        for pipe in pipes:
            pipe.send(None)
        for process in multiprocessing.active_children():
            process.join()


if __name__ == "__main__":
    main()
