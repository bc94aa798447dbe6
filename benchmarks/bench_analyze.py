"""The pass of an analysis against an evaluation of the same tokens: tokens/s of both, and their ratio.

    python benchmarks/bench_analyze.py                        # two minutes on one core

Both read the same batches with the same model, in turn, one pass of each to warm up; the table has medians. An
analysis reads its tokens once more before, to know which are rare: that is in its time. `processor` is the ratio of
processor times, in which other programs are not. Closer looks (outputs of all experts, losses without some) take as
many tokens as they are told and are not in it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from titan_moe.analyze.analysis import Settings, Text, Tokens, run_pass
from titan_moe.analyze.counts import count_tokens
from titan_moe.analyze.tokens import Vocabulary, rare_ids
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.runtime.world import read_world
from titan_moe.step import evaluate

SEQ, BATCH = 512, 8
# dim, layers, vocabulary, experts, their width, top_k
CASES = {
    "debug": (64, 4, 2048, 8, 64, 2),
    "8 experts": (256, 4, 8192, 8, 512, 2),
    "64 experts": (256, 4, 8192, 64, 128, 6),
    "128 experts, large vocabulary": (256, 4, 50304, 128, 128, 8),
}


def measure(dim: int, layers: int, vocab: int, experts: int, width: int, top_k: int, batches: int, repeats: int) -> str:
    """A row of the table."""
    # Tokens as frequent as those of text, with an end of a document here and there.
    device = read_world().device
    sizes = {"vocab_size": vocab, "dim": dim, "num_layers": layers, "num_heads": 4, "num_experts": experts}
    router = ROUTERS["topk_softmax"](top_k=top_k)
    model = Transformer(**sizes, expert_dim=width, router=router, loss_chunk_tokens=-1).to(device).eval()
    model.init_weights(0)
    ranks = torch.arange(1, vocab + 1, dtype=torch.float64)
    tokens = torch.multinomial(1 / ranks, batches * BATCH * SEQ, replacement=True).view(batches, BATCH, SEQ)
    data = [(one.to(device), one.roll(-1, 1).to(device)) for one in tokens]
    vocabulary = Vocabulary(
        torch.randint(0, 5, (vocab,), device=device),
        torch.zeros(vocab, dtype=torch.bool, device=device),
        [b"x"] * vocab,
        [""] * vocab,
        100,
    )
    texts = [Text("text", [], lambda: data, SEQ, BATCH)]

    def analysis() -> None:
        by_class = count_tokens([text.batches for text in texts], vocabulary)
        counted = Tokens(vocabulary, by_class, rare_ids(by_class.sum(0), vocabulary, 0.01))
        run_pass(model, texts, counted, Settings(), read_world())

    def evaluation() -> None:
        with torch.no_grad():
            evaluate(model, data, torch.ones(vocab, dtype=torch.int64, device=device))

    # In turn, so that what else the machine does slows both down.
    spent: dict[Callable[[], None], list[tuple[float, float]]] = {analysis: [], evaluation: []}
    for _ in range(repeats + 1):
        for task, times in spent.items():
            times.append(seconds(task, device))
    (wall, processor), (other_wall, other_processor) = (
        [statistics.median(column) for column in zip(*times[1:], strict=True)] for times in spent.values()
    )
    speed, other_speed = tokens.numel() / wall, tokens.numel() / other_wall
    ratios = f"{other_wall / wall:.2f} | {other_processor / processor:.2f}"
    return f"{speed:,.0f} | {other_speed:,.0f} | {ratios}"


def seconds(task: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of a task by the clock, and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} sequences of {SEQ} tokens (4)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| model | analysis, tokens/s | evaluation, tokens/s | analysis / evaluation | by processor time |")
    print("|---|---:|---:|---:|---:|")
    for name, sizes in CASES.items():
        print(f"| {name} | {measure(*sizes, options.batches, options.repeats)} |", flush=True)


if __name__ == "__main__":
    main()
