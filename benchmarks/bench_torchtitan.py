"""What each piece of torchtitan_patches adds to a step of stock torchtitan on this CPU.

    python -m benchmarks.bench_torchtitan [--rounds 5] [--dim 256] [--tokens 1024]

All variants are trainers in one process at the same weights; in a round each takes a step, one after the other, so what
else the machine does hits them alike. Printed are the medians over rounds of CPU seconds and of their ratio to the
stock step of the same round.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch

from tests.torchtitan import cpu

# The preset with all of its roots at the first step: by default the first hundred steps are AdamW's.
EARLY = {"name": "shampoo_fast", "start_preconditioning_step": 1, "stagger_roots": False}
PIECES: dict[str, dict[str, Any]] = {
    "stock": {},
    "metrics": {"metrics": True},
    "aux_loss, z_loss": {"balancers": {"aux_loss": {"coeff": 0.01}, "z_loss": {}}},
    "loss_free": {"balancers": {"loss_free": {}}},
    "rates of groups": {"optimizer": {"router": {"lr": 1e-4}}},
    "rates by load": {"optimizer": {"expert": {"load_lr": "ideal_normalized"}}},
    "shampoo_fast for experts": {"optimizer": {"expert": EARLY}},
}


def main() -> None:
    """Build, warm up, and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    # torchtitan expects a GPU, and one trainer in a process: the first one makes the process group, others use it.
    cpu.prepare()
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

    start = Trainer.init_distributed

    def once(trainer: Any) -> Any:
        if torch.distributed.is_initialized():
            return ParallelDims.from_config(trainer.config.parallelism, 1)
        return start(trainer)

    Trainer.init_distributed = once
    steps = {name: step_of(options, pieces) for name, pieces in PIECES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 2):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # none is always first
            before = time.process_time()
            steps[name]()
            if number >= 2:
                seconds[name].append(time.process_time() - before)
    print("| piece | CPU seconds | ratio |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["stock"], strict=True))
        print(f"| {name} | {statistics.median(values):.3f} | {ratio:.3f} |")


def step_of(options: argparse.Namespace, pieces: dict[str, Any]) -> Any:
    """A function that takes the next step of a fresh run."""
    from torchtitan_patches import enable
    from torchtitan_patches.debug import debug_moe, small_model

    # All variants have the same weights. Metrics are logged at every step, so that their cost shows.
    config = debug_moe()
    sizes = {"dim": options.dim, "expert_dim": 2 * options.dim, "num_layers": 4, "num_experts": 8, "top_k": 2}
    config.model_spec = small_model(**sizes)
    config.training.seq_len, config.training.local_batch_size = options.tokens // 4, 4
    config.metrics.log_freq, config.validator.enable, config.debug.seed = 1, False, 1
    config.override.imports = ["tests.torchtitan.cpu_overrides.attention"]
    if pieces:
        enable(config, **pieces)
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    return step


if __name__ == "__main__":
    main()
