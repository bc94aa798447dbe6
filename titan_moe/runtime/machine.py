"""The machine: memory, threads, folders, and the only table of GPUs, from their data sheets."""

import ctypes
import datetime
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titan_moe import __version__
from titan_moe.runtime.world import Runtime


class GPU(NamedTuple):
    """One GPU, from NVIDIA's data sheets: dense rates (without sparsity), bytes a second in one direction."""

    memory: float  # GiB, as nvidia-smi shows them
    bf16: float  # FLOP/s of tensor cores
    fp32: float  # FLOP/s outside tensor cores, which is where torch takes products in fp32 by default
    bandwidth: float  # of the device's memory
    nvlink: float  # to the GPUs that NVLink or its bridge joins
    linked: int  # how many these are
    network: float  # one card a GPU, as in NVIDIA's own nodes: 200 Gb/s with an A100, 400 Gb/s with the others


GPUS = {
    "A100-40GB": GPU(39.6, 312e12, 19.5e12, 1.555e12, 300e9, 8, 25e9),
    "A100": GPU(79.3, 312e12, 19.5e12, 2.039e12, 300e9, 8, 25e9),
    "H100-PCIe": GPU(79.6, 756e12, 51e12, 2.0e12, 300e9, 2, 50e9),
    "H100-NVL": GPU(93.6, 835.5e12, 60e12, 3.9e12, 300e9, 2, 50e9),
    "H100": GPU(79.6, 989e12, 67e12, 3.35e12, 450e9, 8, 50e9),
    "H200-NVL": GPU(140.4, 835.5e12, 60e12, 4.8e12, 450e9, 4, 50e9),
    "H200": GPU(140.4, 989e12, 67e12, 4.8e12, 450e9, 8, 50e9),
    "GH200": GPU(95.6, 989e12, 67e12, 4.0e12, 450e9, 1, 50e9),
    "B200": GPU(179.1, 2250e12, 75e12, 8.0e12, 900e9, 8, 50e9),
    "GB200": GPU(185.0, 2500e12, 80e12, 8.0e12, 900e9, 72, 50e9),
}


def find_gpu(device_name: str) -> GPU | None:
    """The GPU of a name as torch.cuda.get_device_name gives it, "NVIDIA H100 NVL"; None for one that is not known.

    Whole words are compared, as "B200" is also a part of "GB200", and of two entries the longer one holds. A MIG slice
    is not its GPU.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    names = [name for name in GPUS if words >= set(name.lower().split("-"))]
    return None if "mig" in words or not names else GPUS[max(names, key=len)]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far, GiB: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known (a CPU, for example)."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bf16


def return_large_buffers() -> None:
    """Have glibc give freed buffers of 16 MiB and more back at once (CPU runs on Linux).

    By default it moves ever larger ones to the heap, where the changing sizes of gathered parameters and gradients
    leave holes: a sharded model of 240 M parameters held 1.1 GiB more than it used.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD: keep the heap's top for the next step


def worker_environment(*, threads: int, devices: Sequence[int] = ()) -> dict[str, str]:
    """The environment of a training process that this one starts, with so many CPU `threads`.

    `devices` are the GPUs it sees; empty, it sees those that this process sees. What torchrun set for this process is
    left out.
    """
    changes = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    if devices:
        changes["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launch} | changes


def c_compiler() -> str | None:
    """The C compiler with which Triton would build its launchers, None where there is none."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def user_cache_folder() -> Path:
    """Folder for tokenized data: $XDG_CACHE_HOME/titan_moe, by default ~/.cache/titan_moe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_moe"


def describe_machine(runtime: Runtime) -> dict[str, Any]:
    """Versions, git commit, world size and device, for run.json."""
    # All that may change results or times beside the configuration; reports compare runs by it.
    cuda = runtime.device.type == "cuda"
    return {
        "titan_moe": __version__,
        "git_commit": _git_commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(runtime.device) if cuda else platform.processor() or platform.machine(),
        "world_size": runtime.world_size,
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    """The checkout's commit, `-dirty` with changes; None where there is no checkout or no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        shown = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return shown.stdout.strip() or None
