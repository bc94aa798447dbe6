"""Cross-entropy of an output head: time, memory and errors of titan_moe's chunks, of whole logits, and of torch's own.

    python benchmarks/bench_loss.py                                               # sizes for a CPU
    python benchmarks/bench_loss.py --device cuda --tokens 32768 --dim 768 --vocab 50304 --chunks 1024 2048 4096 8192

Time is the smallest of some passes forward and backward, on a CPU of its one thread, less what other programs took.
Memory is the most that is allocated above the inputs, the gradients that are returned included. Errors are against
float64 with the same inputs, over the exact value's norm. With `--compiled` titan_moe's softmax and the whole logits
are compiled, too.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.cross_entropy import linear_cross_entropy, softmax_

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(x_TD: Tensor, weight_VD: Tensor, labels: Tensor) -> Tensor:
    """The loss on all logits at once."""
    return F.cross_entropy(F.linear(x_TD, weight_VD).float(), labels, reduction="sum")


def losses(chunks: list[int], compiled: bool) -> dict[str, Loss]:
    """The losses to compare, by name."""
    cases: dict[str, Loss] = {"whole logits": whole}
    cases |= {f"titan_moe, {n}": functools.partial(linear_cross_entropy, chunk_tokens=n) for n in chunks}
    if compiled:
        fast = torch.compile(softmax_, fullgraph=True)
        cases["whole logits, compiled"] = torch.compile(whole, fullgraph=True)
        for n in chunks:
            cases[f"titan_moe, {n}, compiled"] = functools.partial(linear_cross_entropy, chunk_tokens=n, softmax_=fast)

    # torch's own, where it has one: from 2.13 on.
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        theirs: Any = functools.partial(F.linear_cross_entropy, reduction="sum")
        options = torch.nn.LinearCrossEntropyOptions
        cases["torch, no options"] = theirs
        cases["torch, auto"] = functools.partial(theirs, options=options())
        for n in chunks:
            accurate = options(batch_chunk_size=n, chunking_method=None, acc_policy="accurate")
            cases[f"torch, {n}, accurate"] = functools.partial(theirs, options=accurate)
    return cases


def measure(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], rounds: int) -> tuple[float, float]:
    """(seconds, MiB) of a pass forward and backward."""
    # On a CPU the processor's time, in which other programs have no part; a GPU is waited for.
    on_gpu = inputs[0].is_cuda
    clock = time.perf_counter if on_gpu else time.process_time

    def run() -> float:
        begin = clock()
        torch.autograd.grad(loss(*inputs) / len(inputs[2]), inputs[:2])
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - begin

    run()
    seconds = min(run() for _ in range(rounds))

    # Memory in a pass of its own: the profiler, which alone sees a CPU's allocations, would slow the timed ones.
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    assert trace.profiler is not None
    live = peak = 0
    for event in trace.profiler.kineto_results.events():  # pyrefly: ignore
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return seconds, peak / 2**20


def main() -> None:
    """Print a table for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_TD, weight_VD = (torch.randn(n, given.dim, device=given.device) for n in (given.tokens, given.vocab))
    labels = torch.randint(0, given.vocab, (given.tokens,), device=given.device)
    print(f"torch {torch.__version__}, {given.tokens} tokens x {given.dim} x {given.vocab}")
    print("| type | loss | ms | MiB | loss error | dX error | dW error |\n|---|---|---|---|---|---|---|")
    for dtype in given.dtypes:
        leaves = [(part * 0.3).to(getattr(torch, dtype)).requires_grad_() for part in (x_TD, weight_VD)]
        inputs = (leaves[0], leaves[1], labels)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]

        # in parts, as float64 logits may not fit; sums of parts are exact enough
        want = torch.zeros((), dtype=torch.float64, device=given.device)
        for x, label in zip(exact[0].split(256), labels.split(256), strict=True):
            part = F.cross_entropy(F.linear(x, exact[1]), label, reduction="sum")
            part.backward()
            want += part.detach()
        for name, loss in losses(given.chunks, given.compiled).items():
            got = loss(*inputs)
            grads = torch.autograd.grad(got, leaves)
            pairs = [(got.detach(), want), *zip(grads, (leaf.grad for leaf in exact), strict=True)]
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]  # pyrefly: ignore
            del got, grads, pairs
            seconds, peak = measure(loss, inputs, given.rounds)
            print(
                f"| {dtype} | {name} | {1e3 * seconds:.1f} | {peak:.1f} | "
                + " | ".join(f"{e:.1e}" for e in errors)
                + " |"
            )


if __name__ == "__main__":
    main()
