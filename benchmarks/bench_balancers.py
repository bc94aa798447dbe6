"""What each balancer costs of a training step, beside `loss_free` with the sign rule.

    python benchmarks/bench_balancers.py              # all of them
    python benchmarks/bench_balancers.py erc pid      # these

Whole optimizer steps in fp32 on one thread: dim 128, 8 layers, 16 experts of which 2 are chosen, 256 tokens. All models
begin alike and take their steps in turn; processor seconds, so that other programs on the machine do not count. The
table has the median step of each and its ratio to that of `loss_free`, for each of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from titan_moe.balancer import BALANCERS
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.step import train_step

BASE, VOCAB, WARMUP = "loss_free", 512, 3


def stepper(name: str) -> Callable[[int], float]:
    """A model with that balancer; each call takes the step of that number and gives its processor seconds."""
    balancer = BALANCERS[name]()
    model = Transformer(
        vocab_size=VOCAB,
        dim=128,
        num_layers=8,
        num_heads=4,
        num_experts=16,
        expert_dim=128,
        router=ROUTERS["topk_softmax"](top_k=2),
        expert_bias=balancer.moves_bias,
        balancer_inits={} if balancer.init is None else {name: balancer.init},
        measures={} if balancer.measure is None else {name: balancer.measure},
    )
    model.init_weights(0)
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), {}), lr=1e-4)

    def step(number: int) -> float:
        tokens = torch.randint(0, VOCAB, (2, 129), generator=torch.Generator().manual_seed(number))
        micro_batches = [(tokens[:, :-1], tokens[:, 1:])]
        options = {"max_norm": 1.0, "step": number, "balancer_states": model.balancer_states()}
        start = time.process_time()
        train_step(model, micro_batches, optimizer, {name: (1.0, balancer)}, model.expert_biases(), **options)
        return time.process_time() - start

    return step


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BALANCER", help=f"of {', '.join(BALANCERS)}; all if none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    # In turn, so that what changes on the machine meets all of them.
    torch.set_num_threads(1)
    steppers = {name: stepper(name) for name in (BASE, *(n for n in args.names or BALANCERS if n != BASE))}
    medians: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(args.rounds):
        spent: dict[str, list[float]] = {name: [] for name in steppers}
        for number in range(1, WARMUP + args.steps + 1):
            for name, step in steppers.items():
                spent[name].append(step(number))
        for name, seconds in spent.items():
            medians[name].append(statistics.median(seconds[WARMUP:]))

    print("| balancer | ms a step | of `loss_free` |\n|---|---|---|")
    for name, seconds in medians.items():
        ratios = ", ".join(f"{one / base:.2f}" for one, base in zip(seconds, medians[BASE], strict=True))
        print(f"| `{name}` | {statistics.median(seconds) * 1e3:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
