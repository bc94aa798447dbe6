"""Where time goes: the seconds of steps, and traces of some by torch.profiler."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from titan_moe.runtime.world import Runtime


@contextlib.contextmanager
def profiler(runtime: Runtime, *, enable: bool, folder: Path, freq: int) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; with `enable` the last of every `freq` steps is traced to `folder`."""
    # The loop calls it in any case, and does not have to know whether somebody traces.
    if not enable:
        yield lambda: None
        return

    # The profiler warms up on the step before, where there is one: the first that it sees takes longer than it should.
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


def start_timer(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Time what follows: call the result at its end, and what that returns, at any later time, for the seconds between.

    Only asking for the seconds waits for a GPU: it notes both moments by itself, each when all work before it is done,
    so that the times of steps add up to the time of the run. On a CPU the host's clock tells them.
    """
    # A call on a CPU returns when its work is done, so the clock is right at once.
    if device.type == "cpu":
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop

    # A call on a GPU returns before that: events are put into the stream and tell the GPU's own time.
    started = torch.cuda.Event(enable_timing=True)
    started.record()

    def stop_on_device() -> Callable[[], float]:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()

        def seconds() -> float:
            ended.synchronize()
            return started.elapsed_time(ended) / 1e3  # of milliseconds

        return seconds

    return stop_on_device
