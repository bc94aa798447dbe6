"""The estimate's memory beside what processes on this machine allocate: `scripts/compare_estimate.py [--ranks 2]`.

Some steps are run over gloo under torch's memory profiler, which sees every allocation of torch, also those inside
operators. Resident memory would be larger by Python, torch, gloo's buffers and the holes in the heap.
"""

import argparse
import ctypes
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMON = shlex.split(
    "--data.dataset stdlib --data.tokenizer bytes --model.vocab_size 8192 --moe.num_experts 8 --model.num_heads 8 "
    "--model.dim 512 --model.num_layers 6 --moe.expert_dim 1024 --training.seq_len 256 --training.local_batch_size 4 "
    "--training.global_batch_size -1 --training.mixed_precision_param float32 --validation.enable false "
    "--checkpoint.enable false --metrics.enable_tensorboard false"
)
LAYOUTS = {
    "FSDP": [],
    "FSDP, bf16": ["--training.mixed_precision_param", "bfloat16"],
    "FSDP, full checkpointing": ["--activation_checkpoint.mode", "full"],
    "EP over all ranks": ["--parallelism.expert_parallel_degree", "{ranks}", "--debug.force_balanced_routing", "true"],
    "EP over half of the ranks": [
        *("--parallelism.expert_parallel_degree", "{half}"),
        *("--debug.force_balanced_routing", "true"),
    ],
}
GIB = 2**30


def train(arguments: list[str], result: Path) -> None:
    """Train in this process, one of torchrun's; rank 0 leaves its largest number of allocated bytes in `result`."""
    import torch

    from titan_moe.runtime import world
    from titan_moe.train import main as train_main

    # The trace has the total after every allocation and free, of which the largest is the peak.
    count_frees_of_all_threads(Path(torch.__file__).parent / "lib" / "libc10.so")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_main(arguments)
    if world.read_world().is_main:
        trace = result.with_suffix(".trace")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
        result.write_text(str(max(totals)))
    world.close_process_group()


def count_frees_of_all_threads(library: Path) -> None:
    """Make torch count memory in every thread, not in the profiled one alone.

    gloo's threads let go of the tensors of asynchronous collectives, all-to-alls among them. The profiler would see
    these allocated and never freed, which looks like a leak.
    """
    ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage").value = True


def python(words: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def allocated(arguments: list[str], ranks: int, steps: int) -> float:
    """The most that torch had allocated at one time on rank 0, GiB."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "peak"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__]
        run_arguments = ["--training.steps", str(steps), "--job.dump_folder", folder]
        python([*torchrun, "--train", str(result), *arguments, *run_arguments])
        return int(result.read_text()) / GIB


def estimated(arguments: list[str], ranks: int) -> float:
    """The peak that the estimate gives for the same training, GiB."""
    lines = python(["-m", "titan_moe.estimate", "--world_size", str(ranks), *arguments]).splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("  all  "))


def main() -> None:
    # torchrun starts this file again, for each rank.
    if sys.argv[1:2] == ["--train"]:
        return train(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    options = parser.parse_args()
    print(f"{'layout':28}{'estimated':>12}{'measured':>12}{'ratio':>8}   GiB of a rank, {options.ranks} ranks")
    for name in options.layouts:
        degrees = {"ranks": options.ranks, "half": options.ranks // 2}
        arguments = [*COMMON, *(word.format(**degrees) for word in LAYOUTS[name])]
        estimate = estimated(arguments, options.ranks)
        real = allocated(arguments, options.ranks, options.steps)
        print(f"{name:28}{estimate:12.3f}{real:12.3f}{estimate / real:8.3f}", flush=True)
    return None


if __name__ == "__main__":
    main()
