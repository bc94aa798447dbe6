"""Traces of some steps by torch.profiler."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from titan_moe.runtime import Runtime


@contextlib.contextmanager
def profiler(runtime: Runtime, *, enable: bool, folder: Path, freq: int) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; with `enable` the last of every `freq` steps is traced to `folder`."""
    if not enable:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    warmup = min(1, freq - 1)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=freq - 1 - warmup, warmup=warmup, active=1),
        on_trace_ready=lambda prof: _write_trace(prof, folder, runtime.rank),
    ) as profile:
        yield profile.step


def _write_trace(profile: torch.profiler.profile, folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(folder / f"step-{profile.step_num}-rank-{rank}.json"))
