"""Time and memory of a MoE model against a dense model with the same active FLOPs (the dense roof), and its peers.

    python benchmarks/bench_moe.py                            # whole steps: ratio to the roof, peak memory
    python benchmarks/bench_moe.py --mode growth              # forward and backward with 8 to 128 experts
    python benchmarks/bench_moe.py --mode profile             # where our step's time goes
    python benchmarks/bench_moe.py --mode floor               # what separate experts cost before any token is moved

A step is forward, cross-entropy, backward and fused AdamW on one thread. Each peer's step is taken between two steps of
the roof and compared with their mean; the tables have medians. Every step has a fresh random batch, so that the
experts' loads, and with them the shapes of their matrix products, change as they do in training. Time is processor
time: on one thread the wall time, less what other programs took; with `--device cuda` it is the GPU's, by events. Peak
memory is parameters, optimizer states, and the most that torch had allocated on top of them within a step.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_peers import DIM, LAYERS, PEERS, SEQ, TOP_K, VOCAB, decoder  # pyrefly: ignore
from torch import nn

BATCH = 4
MODELS = {"ref": (8, 512), "many": (64, 256)}  # (num_experts, expert_dim)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_compiled": torch.bfloat16}
WARMUP = 3


class Bench(NamedTuple):
    """A step and the bytes that its parameters and optimizer states will take."""

    step: Callable[[], None]
    state_bytes: int


def build(model: nn.Module, dtype: str, train: bool = True) -> Bench:
    """A step on a fresh random batch; without `train`, forward and backward alone."""
    # Blocks are compiled one by one, as training does it; transformers has them one level deeper.
    if dtype.endswith("compiled"):
        blocks: Any = getattr(model, "layers", None) or model.model.layers  # pyrefly: ignore
        for block in blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def step() -> None:
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
        output = model(tokens[:, :-1])
        logits = output[0] if isinstance(output, tuple) else output.logits
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if train:
            optimizer.step()
        optimizer.zero_grad()

    return Bench(step, 3 * sum(p.numel() * p.element_size() for p in model.parameters()))


def timed(step: Callable[[], None]) -> float:
    """Processor seconds of one step; on a GPU seconds from its first kernel to its last."""
    if on_gpu():
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000
    start = time.process_time()
    step()
    return time.process_time() - start


def on_gpu() -> bool:
    """Whether models are made on a GPU."""
    return torch.get_default_device().type == "cuda"


def available(peer: str) -> bool:
    """Whether the peer's library is installed."""
    library = peer.split(maxsplit=1)[0]
    return library in ("dense", "titan_moe") or importlib.util.find_spec(library) is not None


def measure_steps(model: str, dtype: str, peers: list[str], rounds: int) -> dict[str, tuple[float, float, float]]:
    """(median seconds, median ratio to the roof, peak GiB) of every peer."""
    # All models are alive at once, so that all are timed in the same minutes.
    benches = {peer: build(PEERS[peer](*MODELS[model], DTYPES[dtype]), dtype) for peer in peers}
    for bench in benches.values():
        for _ in range(WARMUP):
            bench.step()

    # Each peer's step stands between two of the roof: what slows the machine for a while slows both sides of a ratio.
    roof = benches["dense roof"].step
    times: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        before = timed(roof)
        for peer in peers[1:]:
            seconds = timed(benches[peer].step)
            after = timed(roof)
            times[peer].append((seconds, seconds / ((before + after) / 2)))
            times["dense roof"].append((after, 1.0))
            before = after
    return {
        peer: (
            statistics.median(s for s, _ in values),
            statistics.median(r for _, r in values),
            peak_memory(*benches[peer]),
        )
        for peer, values in times.items()
    }


def peak_memory(step: Callable[[], None], state_bytes: int) -> float:
    """GiB: what parameters and optimizer states keep, and the most that torch had allocated on top within one step."""
    # The states are counted by their sizes and not seen here: they are allocated long before the step.
    if on_gpu():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (state_bytes + torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    assert trace.profiler is not None
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyrefly: ignore
    return (state_bytes + max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))) / 2**30


def step_table(models: list[str], dtypes: list[str], peers: list[str], rounds: int) -> None:
    """Print ratios to the roof with peak memory."""
    print("| model | dtype | peer | step, s | x roof | peak, GiB |\n|---|---|---|---|---|---|")
    for model in models:
        for dtype in dtypes:
            torch.compiler.reset()
            for peer, (seconds, ratio, peak) in measure_steps(model, dtype, peers, rounds).items():
                print(f"| {model} | {dtype} | {peer} | {seconds:.3f} | {ratio:.3f} | {peak:.3f} |", flush=True)


def growth_table(dtypes: list[str], rounds: int) -> None:
    """Print forward + backward of our model with more and more experts, each round over all sizes."""
    sizes, expert_dim = (8, 16, 32, 64, 128), MODELS["many"][1]
    print("| dtype | " + " | ".join(f"{size} experts" for size in sizes) + " |\n" + "|---" * (len(sizes) + 1) + "|")
    for dtype in dtypes:
        torch.compiler.reset()
        models = {size: decoder(size, expert_dim).to(DTYPES[dtype]) for size in sizes}
        steps = {size: build(model, dtype, train=False).step for size, model in models.items()}

        # A ratio is of two sizes in the same round; the table has the median of these, not a ratio of medians.
        for step in steps.values():
            for _ in range(WARMUP):
                step()
        times = [[timed(step) for step in steps.values()] for _ in range(rounds)]
        columns = list(zip(*times, strict=True))
        ratios = [statistics.median(t / first for t, first in zip(c, columns[0], strict=True)) for c in columns]
        cells = [f"{statistics.median(c):.3f} s ({r:.2f}x)" for c, r in zip(columns, ratios, strict=True)]
        print(f"| {dtype} | " + " | ".join(cells) + " |", flush=True)


def floor_table(models: list[str], dtypes: list[str], rounds: int) -> None:
    """Print what a step takes over the roof when only its products are by expert and its parameters updated.

    Every expert has the same number of rows, and nothing is routed, gathered, weighted or summed. The products of a
    layer are three of each kind: to the hidden width, back from it, and for the weights.
    """
    print("| model | dtype | products, by expert over one | AdamW over the roof's | step over the roof |")
    print("|---" * 5 + "|")
    for model in models:
        for dtype in dtypes:
            torch.compiler.reset()
            roof = build(PEERS["dense roof"](*MODELS[model], DTYPES[dtype]), dtype).step
            tasks = floor_tasks(*MODELS[model], DTYPES[dtype])
            for task in (roof, *tasks) * WARMUP:
                task()

            # The floor is the roof's step plus what products by expert and a larger update add in the same round.
            times = [[timed(roof), *map(timed, tasks)] for _ in range(rounds)]
            ratios = [
                (separate / one, ours / theirs, (step + separate - one + ours - theirs) / step)
                for step, one, separate, theirs, ours in times
            ]
            cells = [f"{statistics.median(column):.3f}" for column in zip(*ratios, strict=True)]
            print(f"| {model} | {dtype} | " + " | ".join(cells) + " |", flush=True)


def floor_tasks(num_experts: int, expert_dim: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Make a step's feed-forward products as one product each and by expert, and AdamW on the dense and MoE models."""

    def products(groups: int, hidden: int) -> Callable[[], None]:
        # As many rows in all, whatever the number of groups, and outputs that are made before: only products are timed.
        rows = BATCH * SEQ * TOP_K * expert_dim // hidden // groups
        x, h = torch.randn(groups, rows, DIM).to(dtype), torch.randn(groups, rows, hidden).to(dtype)
        weight = torch.randn(groups, hidden, DIM).to(dtype)
        out_x, out_h, out_w = torch.empty_like(x), torch.empty_like(h), torch.empty_like(weight)

        def run() -> None:
            for _ in range(3 * LAYERS):
                for group in range(groups):
                    torch.mm(x[group], weight[group].t(), out=out_h[group])
                    torch.mm(h[group], weight[group], out=out_x[group])
                    torch.mm(h[group].t(), x[group], out=out_w[group])

        return run

    def updates(peer: str) -> Callable[[], None]:
        model = PEERS[peer](num_experts, expert_dim, dtype)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.optim.AdamW(model.parameters(), fused=True).step  # pyrefly: ignore

    dense, separate = products(1, TOP_K * expert_dim), products(num_experts, expert_dim)
    return [dense, separate, updates("dense roof"), updates("titan_moe")]


def profile(model: str, dtype: str, peer: str) -> None:
    """Print the operators of three warm steps by their own time."""
    step = build(PEERS[peer](*MODELS[model], DTYPES[dtype]), dtype).step
    for _ in range(WARMUP):
        step()
    with torch.profiler.profile() as trace:  # of a CPU, and of a GPU where there is one
        for _ in range(3):
            step()
    by = f"self_{torch.get_default_device().type}_time_total"
    print(trace.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))


def machine() -> str:
    """Processor, its bf16 instructions, and versions."""
    if on_gpu():
        return f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "?")
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in info] or ["no bf16 instructions"]
    return f"{name} ({', '.join(bf16)}), 1 thread, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mode", choices=("step", "growth", "profile", "floor"), default="step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="all that are installed; the profile is of the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    # The command and the machine stand above the numbers, so that a table copied elsewhere can be repeated.
    torch.set_num_threads(1)
    torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    print(f"`python {' '.join(sys.argv)}`\n\n{machine()}. Decoder: dim {DIM}, {LAYERS} layers,")
    print(f"vocabulary {VOCAB}, {BATCH} x {SEQ} tokens, top-{TOP_K}; medians of {arguments.rounds} rounds.\n")

    if arguments.mode == "growth":
        return growth_table(arguments.dtypes, arguments.rounds)
    if arguments.mode == "floor":
        return floor_table(arguments.models, arguments.dtypes, arguments.rounds)
    if arguments.mode == "profile":
        return profile(arguments.models[0], arguments.dtypes[0], (arguments.peers or ["titan_moe"])[0])
    peers = ["dense roof", *(p for p in arguments.peers or PEERS if p != "dense roof" and available(p))]
    step_table(arguments.models, arguments.dtypes, peers, arguments.rounds)
    return None


if __name__ == "__main__":
    main()
