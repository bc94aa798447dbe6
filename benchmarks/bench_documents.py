"""CPU seconds of attention and of a step inside documents, over those without: one thread, in turn.

    python benchmarks/bench_documents.py --rounds 8

Documents have exponential lengths of a mean, or are whole sequences (0). Attention is of 12 heads of 64 channels,
forward and backward; the step is of a small model in fp32 with AdamW.
"""

import argparse
import random
import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.balancer import BALANCERS
from titan_moe.model.documents import attend_by_mask, attend_in_documents, documents_of, places_of
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.step import train_step

EOT, VOCAB = 0, 4096


def main() -> None:
    """Print a line for each length of sequences and mean length of documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for sequences, length in ((4, 512), (1, 2048)):
        for mean in (100, 400, 0):
            tokens = make_tokens(sequences, length, mean)
            shown = f"{sequences} x {length}, mean length {mean or 'whole'}, {int((tokens == EOT).sum())} ends of text"
            sys.stdout.write(f"{shown}\n")
            for name, jobs in (("attention", attentions(tokens)), ("step", steps(tokens))):
                ratios = compare(jobs, rounds)
                sys.stdout.write(f"  {name}: {', '.join(f'{key} {value:.2f}' for key, value in ratios.items())}\n")


def make_tokens(sequences: int, length: int, mean: int) -> Tensor:
    """Random tokens (B, S) with ends of text."""
    draw = random.Random(1)
    tokens = torch.randint(1, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(0))
    for row in tokens:
        place = 0
        while mean and (place := place + max(1, int(draw.expovariate(1 / mean)))) < length:
            row[place] = EOT
    return tokens


def attentions(tokens: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of attention without documents, and inside them by each way of a CPU."""
    q, k, v, grad = (torch.randn(*tokens.shape, 12, 64).transpose(1, 2).requires_grad_() for _ in range(4))
    found = documents_of(places_of(tokens, EOT).document_ids, 0, tokens.shape[1], limited=False)
    ways = {
        "plain": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "by document": lambda: attend_in_documents(q, k, v, found),
        "mask": lambda: attend_by_mask(q, k, v, found.first_keys),
    }
    return {name: lambda way=way: torch.autograd.grad(way(), (q, k, v), grad) for name, way in ways.items()}


def steps(tokens: Tensor) -> dict[str, Callable[[], object]]:
    """A training step without documents, inside them, and with positions that restart."""
    balancers = {"aux_loss": (0.01, BALANCERS["aux_loss"](coeff=1.0))}
    sizes: dict[str, Any] = {
        "dim": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_experts": 8,
        "expert_dim": 512,
        "vocab_size": VOCAB,
    }

    def step(**options: Any) -> Callable[[], object]:
        model = Transformer(**sizes, router=ROUTERS["topk_softmax"](top_k=2), loss_chunk_tokens=256, **options)
        model.eot_id = EOT
        model.init_weights(0)
        adamw = OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), {}), lr=1e-3)
        return lambda: train_step(model, [(tokens, tokens)], adamw, balancers, [], max_norm=1.0)

    masked = {"document_mask": True}
    return {"plain": step(), "masked": step(**masked), "restarted": step(**masked, restart_positions=True)}


def compare(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each job's CPU seconds over those of the first, in the same round; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            before = cpu_seconds()
            job()
            seconds[name].append(cpu_seconds() - before)
    plain, *others = jobs
    pairs = {name: zip(seconds[name][1:], seconds[plain][1:], strict=True) for name in others}
    return {name: statistics.median(one / base for one, base in own) for name, own in pairs.items()}


def cpu_seconds() -> float:
    """Of this process, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
