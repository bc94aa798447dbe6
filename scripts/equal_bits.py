"""Compare two checkouts to the bit: `python scripts/equal_bits.py BEFORE AFTER [--only NAME ...]`.

Each case is a short run of `train_configs/debug_moe.toml` with the code of either checkout, in one process or on two
ranks. The numbers of metrics.jsonl must be equal but for times, and so must every tensor of the checkpoint; a state of
the optimizer that has another name in AFTER is listed. The exit code is 1 where a case differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SMALL = (
    "--job.config_file train_configs/debug_moe.toml --model.num_layers 2 --training.steps 6 --validation.freq 6 "
    "--validation.steps 2 --training.global_batch_size 8 --training.local_batch_size 2 "
    "--metrics.enable_tensorboard false --lr_scheduler.warmup_steps 2"
)
LAYOUTS = {
    "one": "",
    "fsdp2": "--parallelism.data_parallel_shard_degree 2",
    "ddp2": "--parallelism.data_parallel_shard_degree 1 --parallelism.data_parallel_replicate_degree 2",
    "ep2": "--parallelism.expert_parallel_degree 2",
    "tp2": "--parallelism.tensor_parallel_degree 2",
    "cp2": "--parallelism.context_parallel_degree 2",
}
OPTIMIZERS = {
    "shampoo": "--optimizer.expert.name shampoo",
    "shampoo_fast": "--optimizer.expert.name shampoo_fast",
    "soap": "--optimizer.expert.name soap",
    "muon": "--optimizer.expert.name muon",
    "dense_soap": "--optimizer.dense.name soap --optimizer.dense.precondition_frequency 2",
    "load_lr": "--optimizer.expert.load_lr ideal_normalized --optimizer.expert.load_lr_ema 0.5",
    "muon_by_load": "--optimizer.expert.name muon --optimizer.expert.load_lr batch_fraction",
    "outside": "--optimizer.name torch.optim:NAdam",
    "outside_by_load": "--optimizer.expert.name torch.optim:RMSprop --optimizer.expert.load_lr ideal_normalized",
}
# cases that take other ways through the router, the balancers or the step
OTHERS = {
    "sequence": "--balancer.aux_loss.scope sequence --balancer.loss_free.rate 0.01 --metrics.expert_stats_freq 2",
    "exact": "--balancer.aux_loss.scope global_batch_exact --balancer.loss_free.rule quantile",
    "capacity": "--router.name switch --moe.top_k 1 --router.capacity_factor 1.0 --metrics.balance_tax_freq 3",
    "expert_choice": "--router.name expert_choice --balancer.aux_loss false",
    "compiled": "--compile.enable",
    "checkpointed": "--activation_checkpoint.mode full --training.mixed_precision_param bfloat16",
}
ON_TWO = {
    "fsdp2": ["shampoo_fast", "muon", "dense_soap", "load_lr", "sequence", "exact"],
    "ep2": ["soap", "load_lr", "sequence"],
}
TIMES = ("balance_tax", "seconds", "per_second", "mfu", "tflops", "memory", "gib", "time")


def cases() -> dict[str, tuple[int, str]]:
    """Name of each case: its number of processes and its arguments."""
    named = {name: (1 if name == "one" else 2, words) for name, words in LAYOUTS.items()}
    named |= {name: (1, words) for name, words in (OPTIMIZERS | OTHERS).items()}
    for layout, names in ON_TWO.items():
        named |= {f"{layout}+{name}": (2, f"{LAYOUTS[layout]} {(OPTIMIZERS | OTHERS)[name]}") for name in names}
    return named


def train(checkout: Path, folder: Path, ranks: int, words: str) -> str:
    """Train with the code of a checkout; the first error that a run that failed has written, else nothing."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "titan_moe.train", *SMALL.split(), *words.split()]
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--job.dump_folder", str(folder)], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    said = [line for line in run.stderr.splitlines() if "rror" in line]
    return "" if run.returncode == 0 else (said or [run.stderr[-1000:]])[0]


def numbers(folder: Path) -> dict[str, object]:
    """Every number of metrics.jsonl but times, by step, kind and name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{line['kind']} {line['step']} {name}": value
        for line in lines
        for name, value in line.items()
        if not any(word in name for word in TIMES)
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the run's last checkpoint, whole, by name."""
    # Read by the sizes in the checkpoint, not into a model: either checkout's classes may differ.
    (step,) = sorted(folder.glob("checkpoint/step-*"))[-1:]
    reader = FileSystemReader(step)
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it loads in one process, which is what is meant
        load(state, storage_reader=reader, no_dist=True)
    return state


def differences(before: Path, after: Path) -> list[str]:
    """A line for each difference between two runs; last come the names of tensors that only one of them has."""
    old, new = numbers(before), numbers(after)
    lines = [f"{name}: {old.get(name)} and {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
    first, second = tensors(before), tensors(after)
    for name in first.keys() & second.keys():
        if not torch.equal(first[name], second[name]):
            lines.append(f"tensor {name}")
    alone = sorted(first.keys() ^ second.keys())
    return lines + [f"only in {'BEFORE' if name in first else 'AFTER'}: {name}" for name in alone]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=cases(), help=", ".join(cases()))
    arguments = parser.parse_args()

    # Both runs are made here and now, on the same machine: bits of another one may differ.
    different = 0
    for name in arguments.only or cases():
        ranks, words = cases()[name]
        with tempfile.TemporaryDirectory() as temporary:
            folders = [Path(temporary, "before"), Path(temporary, "after")]
            checkouts = [arguments.before.resolve(), arguments.after.resolve()]
            faults = [train(*pair, ranks, words) for pair in zip(checkouts, folders, strict=True)]
            lines = [text for text in faults if text] or differences(*folders)
        print(f"{name}: {'equal to the bit' if not lines else f'{len(lines)} differences'}", flush=True)
        print("".join(f"    {line}\n" for line in lines[:12]), end="", flush=True)
        different += bool(lines)
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
