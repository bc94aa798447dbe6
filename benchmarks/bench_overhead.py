"""What features cost of a training step: each step with the feature is compared with the plain steps around it.

    python benchmarks/bench_overhead.py load_lr                 # learning rates by load over one rate for all experts
    python benchmarks/bench_overhead.py load_lr --model many    # 64 experts of width 256 instead of 8 of 512
    python benchmarks/bench_overhead.py metrics                 # what every step records, jsonl and TensorBoard too
    python benchmarks/bench_overhead.py qk_clip                 # the largest logits of attention, and the clip by them

Whole optimizer steps on one thread in fp32, four sequences of 512 tokens, a fresh random batch each; processor seconds,
so that other programs on the machine do not count. Both sides are models of their own with the same weights. The table
has medians; `ratio by the part alone` times what the feature changes by itself, finer than the noise of whole steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from titan_moe import step as step_module
from titan_moe.balancer import BALANCERS
from titan_moe.config import load_config
from titan_moe.metrics import StepOutput, to_numbers
from titan_moe.model.attention import max_logits
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.records import speed_record, train_record, write_record
from titan_moe.runtime.world import read_world
from titan_moe.sinks.files import jsonl
from titan_moe.sinks.sink import fan_out
from titan_moe.sinks.trackers import tensorboard
from titan_moe.step import train_step

TOP_K, VOCAB, SEQ, BATCH, WARMUP = 2, 2048, 512, 4, 2
MODELS = {"ref": (8, 512), "many": (64, 256)}  # (num_experts, expert_dim)


class Side(NamedTuple):
    """One side of a comparison."""

    step: Callable[[Tensor], None]  # a whole step on a batch of tokens
    part: Callable[[], float]  # seconds that the part takes that the feature changes


def build(name: str) -> Transformer:
    """Build the model with 4 layers of width 256."""
    # The same weights each time: both sides of a comparison do the same products.
    num_experts, expert_dim = MODELS[name]
    model = Transformer(
        vocab_size=VOCAB,
        dim=256,
        num_layers=4,
        num_heads=4,
        num_experts=num_experts,
        expert_dim=expert_dim,
        router=ROUTERS["topk_softmax"](top_k=TOP_K),
    )
    model.init_weights(0)
    return model


def seconds(task: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    task()
    return time.process_time() - start


def load_lr(name: str) -> tuple[Side, Side]:
    """AdamW with one rate for all experts, and with load-based rates."""
    balancers = {name: (0.01, BALANCERS[name](coeff=1.0)) for name in ("aux_loss", "z_loss")}

    def side(**options: Any) -> Side:
        # Uneven loads, so that the experts' rates differ.
        model = build(name)
        groups = parameter_groups(model.named_parameters(), {"expert": expand_load_lr(options, top_k=TOP_K)})
        optimizer = OPTIMIZERS["adamw"](groups, lr=1e-4)
        load_LE = torch.arange(1, 4 * MODELS[name][0] + 1).view(4, -1)
        gradients = {p: torch.full_like(p, 1e-4) for p in model.parameters()}

        def step(tokens: Tensor) -> None:
            train_step(model, [(tokens[:, :-1], tokens[:, 1:])], optimizer, balancers, [], max_norm=1.0)

        def part() -> float:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            spent = seconds(lambda: optimizer.step(load=load_LE))
            optimizer.zero_grad()
            return spent

        return Side(step, part)

    return side(), side(load_lr="ideal_normalized", load_lr_ema=0.9, load_lr_power=0.5)


def metrics(name: str) -> tuple[Side, Side]:
    """Steps that measure nothing beside losses, norm and loads, and steps whose whole record is written."""
    balancers = {name: (0.01, BALANCERS[name](coeff=1.0)) for name in ("aux_loss", "z_loss")}
    # Files are written to a disk, as in training.
    folder = tempfile.TemporaryDirectory()
    sink = fan_out(jsonl(Path(folder.name) / "metrics.jsonl", 0), tensorboard(Path(folder.name), 0))
    config = load_config(["--training.mixed_precision_param=float32"])
    runtime = read_world()

    def side(measure: bool) -> Side:
        # What the step itself sums up for the record is part of the cost, so the plain side does without.
        model = build(name)
        optimizer = OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), {}), lr=1e-4)
        sums = step_module.routing_sums if measure else lambda routings: {}
        latest: list[StepOutput] = []

        def record() -> None:
            lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
            line = {"step": 1, "num_tokens": 1, "data_seconds": 0.0, **train_record(model, latest[-1], lrs)}
            line |= speed_record(config, model, runtime, BATCH * SEQ, lambda: 1.0)
            write_record(sink, to_numbers([line])[0])

        def step(tokens: Tensor) -> None:
            with mock.patch.object(step_module, "routing_sums", sums):
                output = train_step(model, [(tokens[:, :-1], tokens[:, 1:])], optimizer, balancers, [], max_norm=1.0)
            latest[:] = [output]
            if measure:
                record()

        def part() -> float:
            if not measure:
                return 0.0
            with torch.no_grad():
                _, routings = model(torch.randint(0, VOCAB, (BATCH, SEQ)))
            return seconds(lambda: (sums(routings), record()))

        return Side(step, part)

    return side(False), side(True)


def qk_clip(name: str) -> tuple[Side, Side]:
    """AdamW without QK-clip, and with a threshold that all heads are above."""
    balancers = {name: (0.01, BALANCERS[name](coeff=1.0)) for name in ("aux_loss", "z_loss")}

    def side(threshold: float) -> Side:
        model = build(name)
        optimizer = OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), {}), lr=1e-4)
        finite = torch.ones((), dtype=torch.bool)
        q = torch.randn(BATCH, 4, SEQ, model.attention_layers()[0].head_dim)

        def step(tokens: Tensor) -> None:
            micro = [(tokens[:, :-1], tokens[:, 1:])]
            train_step(model, micro, optimizer, balancers, [], max_norm=1.0, qk_clip=threshold)

        def clip() -> None:
            largest = torch.stack([max_logits(q, q) for _ in model.layers])
            step_module.clip_heads(model, [largest], threshold, finite)

        return Side(step, lambda: seconds(clip) if threshold else 0.0)

    return side(0.0), side(1e-4)


MODES = {"load_lr": load_lr, "metrics": metrics, "qk_clip": qk_clip}


def compare(plain: Side, feature: Side, pairs: int) -> dict[str, float]:
    """Time plain, feature, plain, feature, ..., plain; each feature step against the mean of its two neighbours."""
    generator = torch.Generator().manual_seed(0)

    def timed(side: Side) -> float:
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
        return seconds(lambda: side.step(tokens))

    # A feature's step between two plain ones: what slows the machine for a while slows both.
    for _ in range(WARMUP):
        timed(plain), timed(feature)
    before, ratios, steps = timed(plain), [], []
    for _ in range(pairs):
        spent, after = timed(feature), timed(plain)
        ratios.append(spent / ((before + after) / 2))
        steps.append((before + after) / 2)
        before = after

    # Costs of a percent are less than the noise of whole steps: what the feature adds is also timed by itself.
    parts = [(plain.part(), feature.part()) for _ in range(2 * pairs)]
    step = statistics.median(steps)
    extra = statistics.median(b - a for a, b in parts)
    return {
        "plain step, ms": 1000 * step,
        "ratio of whole steps": statistics.median(ratios),
        "part without, ms": 1000 * statistics.median(a for a, _ in parts),
        "part with, ms": 1000 * statistics.median(b for _, b in parts),
        "ratio by the part alone": 1 + extra / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("feature", choices=MODES)
    parser.add_argument("--model", choices=MODELS, default="ref")
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain, feature = MODES[arguments.feature](arguments.model)
    for label, value in compare(plain, feature, arguments.pairs).items():
        print(f"{arguments.feature} on {arguments.model}  {label:<24} {value:10.4f}")


if __name__ == "__main__":
    main()
