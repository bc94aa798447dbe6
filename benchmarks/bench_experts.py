"""Experts forward and backward by every backend that can be used here, on moe8x's sizes.

python benchmarks/bench_experts.py [--experts 8 --dim 768 --hidden 2048 --rows 40960] [--uneven] [--compiled]

Liger's kernels run as its environment says: with LIGER_FUSED_MOE_AUTOTUNE=0 one fixed configuration, else the best of
160, found at the first call, in minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from titan_moe.model.experts_backend import EXPERTS_BACKENDS, check_experts_backend
from titan_moe.model.moe import ExpertsBackend

WARMUP, ROUNDS = 5, 30


def rows_of_experts(experts: int, rows: int, uneven: bool) -> list[int]:
    """Rows of each expert, all alike or falling to nearly none."""
    shares = range(experts, 0, -1) if uneven else [1] * experts
    counts = [rows * share // sum(shares) for share in shares]
    return [counts[0] + rows - sum(counts), *counts[1:]]


def one_pass(
    backend: ExpertsBackend, counts: list[int], dim: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Make a function that runs forward and backward on fixed tensors."""
    experts, rows = len(counts), sum(counts)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, w1, w2, w3 = leaf(rows, dim), leaf(experts, hidden, dim), leaf(experts, dim, hidden), leaf(experts, hidden, dim)
    upstream, tokens_per_expert = torch.randn_like(x), torch.tensor(counts, device=device)

    def run() -> None:
        backend(x, w1, w2, w3, tokens_per_expert).backward(upstream)
        for tensor in (x, w1, w2, w3):
            tensor.grad = None

    return run


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Median of some runs, each by events on a GPU and by the clock on a CPU."""
    # The first passes allocate, compile and tune.
    for _ in range(WARMUP):
        run()
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def time_backends(
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    experts: int = 8,
    dim: int = 768,
    hidden: int = 2048,
    rows: int = 40960,
    uneven: bool = False,
    compiled: bool = False,
) -> dict[str, str]:
    """What each backend takes, by name: time, operations a second, peak of memory; or why it can't be used."""
    # A backend that cannot run is a line that says why: which ones can differs from machine to machine.
    texts = {}
    for name, backend in EXPERTS_BACKENDS.items():
        try:
            check_experts_backend(name, device=device, param_dtype=dtype, deterministic=False)
        except ValueError as error:
            texts[name] = str(error)
            continue
        called = torch.compile(backend, fullgraph=True) if compiled else backend
        run = one_pass(called, rows_of_experts(experts, rows, uneven), dim, hidden, dtype, device)

        # 18: three products, forward and twice backward, of 2 operations.
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(run, device)
        texts[name] = f"{taken:.3f} ms, {18 * rows * dim * hidden / taken / 1e9:.1f} TFLOP/s"
        if device.type == "cuda":
            texts[name] += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("experts", 8), ("dim", 768), ("hidden", 2048), ("rows", 40960)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("uneven", "compiled"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = vars(parser.parse_args())
    device = torch.device(arguments.pop("device"))
    for name, text in time_backends(device=device, **arguments).items():
        print(f"{name:12} {text}")


if __name__ == "__main__":
    main()
