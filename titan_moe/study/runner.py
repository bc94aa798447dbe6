"""Train runs as processes of this machine: some at a time, each with its share of cores and GPUs.

A run that fails, or whose process is killed, stops no other.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TextIO

import torch

from titan_moe.runtime import machine
from titan_moe.runtime.command import StopRequest
from titan_moe.runtime.files import write_atomic
from titan_moe.runtime.lock import try_lock
from titan_moe.study.grid import Run
from titan_moe.study.runs import (
    EXIT_CODE,
    LOCK,
    LOG,
    POINT,
    analysis_words,
    is_going,
    lacks_analysis,
    prepare,
    status,
)

PATIENCE = 300.0  # seconds that a training may take to save and end after a SIGTERM
Command = Callable[[Run], list[str]]


class Worker(NamedTuple):
    """A training under way."""

    run: Run
    process: subprocess.Popen[bytes]
    slot: int  # below the pool's jobs: which share of the GPUs it has
    lock: TextIO
    log: TextIO
    is_training: bool = True  # false for the analysis that follows it in its slot


class Pool(NamedTuple):
    """How many trainings at a time, of how many processes each."""

    jobs: int
    nproc: int = 1
    jobs_per_gpu: int = 1


def train_command(nproc: int) -> Command:
    """The command of a run: one process, or several of torchrun."""
    return lambda run: [*launch("titan_moe.train", nproc), "--job.config_file", str(run.folder / POINT)]


def analyze_command(nproc: int) -> Command:
    """The command of the analysis of a finished run, of as many processes."""
    return lambda run: [*launch("titan_moe.analyze", nproc), *analysis_words(run)]


def launch(module: str, nproc: int) -> list[str]:
    """How a command of this package is started in one process, or in several by torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *several, "-m", module]


def check_pool(pool: Pool) -> None:
    """Raise ValueError where this machine has fewer GPUs than the pool would use; one without any trains on the CPU."""
    available = torch.cuda.device_count()
    slots = available // pool.nproc * pool.jobs_per_gpu
    if available and pool.jobs > slots:
        share = "" if pool.jobs_per_gpu == 1 else f", {pool.jobs_per_gpu} trainings on each at a time"
        raise ValueError(
            f"--jobs {pool.jobs} times study.nproc {pool.nproc} is {pool.jobs * pool.nproc} GPUs, but this machine has "
            f"{available}{share}: give --jobs {max(1, slots)}, or let small trainings share a GPU by --jobs_per_gpu"
        )


def environment(pool: Pool, slot: int) -> dict[str, str]:
    """The environment of the training in a slot: its share of the cores, and GPUs where there are any."""
    threads = max(1, (os.cpu_count() or 1) // (pool.jobs * pool.nproc))
    first = slot // pool.jobs_per_gpu * pool.nproc
    devices = range(first, first + pool.nproc) if torch.cuda.device_count() else ()
    return machine.worker_environment(threads=threads, devices=devices)


def run_all(
    runs: Iterable[Run],
    *,
    pool: Pool,
    command: Command,
    keep_checkpoints: bool = True,
    then: Command | None = None,
    on_tick: Callable[[Sequence[Worker]], None],
    on_end: Callable[[Run], None],
    interval: float = 0.2,
) -> int:
    """Train the runs, `pool.jobs` at a time; the number of the signal that stopped it early, else 0.

    A training that has finished is followed by its command of `then`, if that is given, in the same slot.
    `on_tick` gets the trainings under way every `interval` seconds, `on_end` each run that has ended. A run that
    another process works on is left to it. At a signal the trainings are asked to stop, and save; the same command goes
    on from there.
    """
    stop, queue, free = StopRequest(), deque(runs), list(range(pool.jobs))
    active: list[Worker] = []
    try:
        while (queue and not stop.signal) or active:
            # A slot is a share of the cores and certain GPUs, so a new training gets one that nobody has.
            while queue and free and not stop.signal:
                worker = start_run(queue.popleft(), pool, free[0], command, then)
                if worker is not None:
                    active.append(worker)
                    free.remove(worker.slot)

            # From a signal on nothing starts. `_end` waits, so those asked to stop are over in the next paragraph.
            if stop.signal:
                _end(active)

            # Processes are polled, not waited for: any of them may be the next to end, and the table has to move.
            for worker in [worker for worker in active if worker.process.poll() is not None]:
                active.remove(worker)
                if then is not None and worker.is_training and worker.process.returncode == 0 and not stop.signal:
                    words, variables = then(worker.run), environment(pool, worker.slot)
                    process = spawn(words, worker.lock, worker.log, variables)
                    active.append(worker._replace(process=process, is_training=False))
                    continue
                free.append(worker.slot)
                finish(worker, keep_checkpoints, then is not None)
                on_end(worker.run)
            on_tick(active)
            if active:
                time.sleep(interval)
    finally:
        # Only an error in here, such as a full disk, gets here with trainings under way: none is left behind.
        _end(active)
        for worker in active:
            finish(worker, keep_checkpoints, then is not None)
    return stop.signal


def start_run(run: Run, pool: Pool, slot: int, command: Command, then: Command | None = None) -> Worker | None:
    """Start a training in a slot of the pool; None where another process works on the run.

    For a finished run that lacks its analysis start that, by `then`.
    """
    # Between the look and the lock another process may take it, so the lock decides. The look also sees a training
    # that was started without a study.
    run.folder.mkdir(parents=True, exist_ok=True)
    if is_going(run.folder):
        return None
    is_training = then is None or not lacks_analysis(run)
    lock = open(run.folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115
    if not try_lock(lock):
        lock.close()
        return None
    prepare(run)

    log = open(run.folder / LOG, "a", encoding="utf-8")  # noqa: SIM115
    words = command(run) if then is None or is_training else then(run)
    return Worker(run, spawn(words, lock, log, environment(pool, slot)), slot, lock, log, is_training)


def spawn(words: Sequence[str], lock: TextIO, log: TextIO, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command that writes to `log`, with these environment variables.

    It inherits the lock. If this process is killed, the command still holds it until its own end, and no second study
    starts the same run.
    """
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=variables,
        pass_fds=(lock.fileno(),),
        start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the trainings to stop
    )


def finish(worker: Worker, keep_checkpoints: bool, analyzes: bool = False) -> None:
    """Write down how a training ended; remove the checkpoints of a finished one unless they are wanted.

    Where the study `analyzes` its runs, they are wanted until they have been.
    """
    run = worker.run
    code = worker.process.wait()
    worker.log.close()
    worker.lock.close()
    write_atomic(run.folder / EXIT_CODE, f"{code}\n")
    is_finished = status(run.folder, run.config.training.steps).state == "finished"
    if is_finished and not keep_checkpoints and not (analyzes and lacks_analysis(run)):
        shutil.rmtree(run.folder / run.config.checkpoint.folder, ignore_errors=True)


def _end(active: Sequence[Worker]) -> None:
    """Ask the trainings to stop, wait for them, and kill those that have not ended after PATIENCE seconds."""
    for worker in active:
        _signal(worker, signal.SIGTERM)
    limit = time.monotonic() + PATIENCE
    for worker in active:
        try:
            worker.process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(worker, signal.SIGKILL)
            worker.process.wait()


def _signal(worker: Worker, number: int) -> None:
    if worker.process.poll() is None:
        os.killpg(worker.process.pid, number)
