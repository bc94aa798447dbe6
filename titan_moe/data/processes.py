"""Worker processes for building caches: fresh interpreters, whatever threads, devices or main module the caller has.

The standard pools either fork (unsafe once process groups or the tokenizers' own threads run) or import the caller's
main module again (with torch, in every worker). These workers import what their function needs and nothing else.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

TELL_SECONDS = 0.1  # between two reports of `watch`
T = TypeVar("T")
BOOT = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from titan_moe.data.processes import serve; serve()"
)


class _Done(NamedTuple):
    """An item is finished, or a worker has nothing left to do; with the error where it failed."""

    error: BaseException | None


def available_cpus() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(function: Callable[[Any], Iterator[T]], items: Sequence[Any], num_processes: int = 0) -> Iterator[T]:
    """Run `function(item)`, a generator of what it has done, for all items in worker processes; yield what they tell.

    `function` is a module's function and leaves its results in files. 0 processes: one per core. The first error of an
    item is raised here, and all workers are ended. Workers end by themselves when this process is killed.
    """
    # A thread for each worker hands it item after item, so that a worker with small items gets more of them.
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    news: queue.SimpleQueue[T | _Done] = queue.SimpleQueue()
    workers = [_start() for _ in range(min(num_processes or available_cpus(), len(items)))]
    threads = [threading.Thread(target=_drive, args=(worker, function, todo, news), daemon=True) for worker in workers]

    # Each thread ends with one _Done. What workers tell goes on to the caller as it comes.
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            message = news.get()
            if not isinstance(message, _Done):
                yield message
                continue
            running -= 1
            if message.error is not None:
                raise message.error

    # However it ends, an error or a caller that stops iterating included: a killed worker ends the read of its thread,
    # so the threads can be joined.
    finally:
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()
        for worker in workers:
            with contextlib.suppress(BrokenPipeError), worker:  # closes the pipes and reaps it
                pass


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _drive(
    worker: "subprocess.Popen[bytes]",
    function: Callable,
    todo: "queue.SimpleQueue[Any]",
    news: "queue.SimpleQueue[int | _Done]",
) -> None:
    """Feed one worker until nothing is left to do; runs in a thread of its own."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        # First the search path, which lets the worker import this module and the function's.
        worker.stdin.write(pickle.dumps(sys.path))
        while True:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                news.put(_Done(None))
                return

            # The answers to an item are what the function tells and one _Done. After an error nothing more is asked.
            worker.stdin.write(pickle.dumps((function, item)))
            worker.stdin.flush()
            while not isinstance(message := pickle.load(worker.stdout), _Done):
                news.put(message)
            if message.error is not None:
                news.put(message)
                return
    except (EOFError, OSError, pickle.UnpicklingError):  # the worker ended, perhaps in the middle of an answer
        news.put(_Done(RuntimeError(f"a data worker ended early (exit code {worker.wait()}): was it short of memory?")))


def outlive_signals(worker: int) -> None:
    """Leave SIGINT and SIGTERM to the trainer, which needs batches to finish its step; the `worker_init_fn` of loaders.

    A terminal and schedulers signal whole groups of processes. The trainer itself may still end `worker` by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sends a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    # SIGTERM is blocked, so that it waits here to be asked who sent it.
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != trainer.pid:
        pass
    os._exit(0)


def watch(function: Callable[[], T]) -> Generator[dict[str, Any], None, T]:
    """Run `function` in a thread and yield the JSON objects, one a line, that it writes to standard error meanwhile.

    For libraries that tell only there how far they are, in a worker process. Of objects that come faster than ten a
    second the first and the last are yielded; other lines go where they went. Returns what `function` returns.
    """
    # The pipe ends when nothing is left that writes to it: standard error itself, which is put back in the thread.
    reading, writing = os.pipe()
    stderr = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)

    def run() -> T:
        try:
            return function()
        finally:
            os.dup2(stderr, 2)

    told, waiting = 0.0, None
    with ThreadPoolExecutor(1) as pool, open(reading, "rb") as lines:
        result = pool.submit(run)
        for line in lines:
            try:
                waiting = json.loads(line)
            except ValueError:
                os.write(stderr, line)
                continue
            if time.monotonic() - told >= TELL_SECONDS:
                yield waiting
                told, waiting = time.monotonic(), None
        if waiting is not None:
            yield waiting
    os.close(stderr)
    return result.result()


def serve() -> None:
    """Be a worker: answer each (function, item) of standard input with what it tells and a _Done, until it closes."""
    # Ctrl-C reaches the whole group of processes; the parent, which gets it as well, ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # Answers go by a copy of standard output, which itself becomes standard error: whatever a library prints must not
    # mix with them.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: Any) -> None:
        pickle.dump(message, answers)
        answers.flush()

    # The pipe closes when the parent ends, however it ends, and the worker with it.
    while True:
        try:
            function, item = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            for message in function(item):
                send(message)
            send(_Done(None))
        except BrokenPipeError:
            return
        except (ValueError, OSError) as error:  # the user's: one line
            send(_Done(error))
        except Exception:  # a fault: it needs its traceback
            send(_Done(RuntimeError(f"in a data worker:\n{traceback.format_exc()}")))
