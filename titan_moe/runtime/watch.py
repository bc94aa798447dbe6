"""A process that dies or hangs: the others end with one line that names the collective and the step.

torch's flight recorder notes every collective. A thread looks for one that is under way for longer than the limit, as
well as for process groups that are not connected by then. An error out of a collective (gloo's "Connection closed by
peer", an NCCL error) is told apart from other errors.
No process can say which of the others is to blame. Their lines together do: it is the one that prints none, or that
names another collective.
"""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from titan_moe.runtime import command, world
from titan_moe.runtime.errors import CollectiveError

# a name alone would be in the paths of a .venv in a checkout of that name
PACKAGE = __file__.removesuffix("runtime/watch.py")
CONNECTING: dict[str, float] = {}  # what is being connected, and since when (time.monotonic)
CONNECTION_ERRORS = (
    "gloo",
    "NCCL",
    "c10d",
    "Connection closed",
    "Connection reset",
    "Timed out waiting",
    "Broken pipe",
)


@dataclass
class Watch:
    """What the training loop tells the watch."""

    limit_seconds: float  # of one collective
    step: int = 0  # 0 before the first


@contextmanager
def connecting(groups: str) -> Iterator[None]:
    """Let the watch know that this process makes process groups, which waits until all others do.

    The flight recorder can't tell: it notes collectives, and a group has none before it exists. `groups` is what the
    message says is under way, or has failed.
    """
    CONNECTING[groups] = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        raise CollectiveError(f"{groups} failed: {reason(error)}") from error
    finally:
        del CONNECTING[groups]


@contextmanager
def watching(watch: Watch, give_up: Callable[[str], None] = command.give_up) -> Iterator[None]:
    """Watch the collectives of this process; raise CollectiveError where one fails.

    A collective that is under way for longer than `watch.limit_seconds` ends the process, and so do groups that are not
    connected by then: the thread that waits can't be interrupted. `give_up` gets the message and ends it.
    """
    # A thread looks, as the main one is stuck in the collective when it matters.
    ended = threading.Event()
    thread = threading.Thread(target=_look, args=(watch, ended, give_up), name="watch", daemon=True)
    thread.start()

    # backward raises a collective's error as a plain RuntimeError: its text decides.
    try:
        yield
    except CollectiveError as error:
        raise CollectiveError(f"{place(watch)}: {error}") from error
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        raise CollectiveError(f"{place(watch)}: {_last_collective()} failed: {reason(error)}") from error
    finally:
        ended.set()
        thread.join()


def _look(watch: Watch, ended: threading.Event, give_up: Callable[[str], None]) -> None:
    """Until `ended`: give up as soon as a collective, or the connecting of groups, takes longer than the limit."""
    seconds = 0.0
    # The next look is at the latest when what was under way at this one reaches the limit.
    while not ended.wait(min(10.0, watch.limit_seconds / 4, max(watch.limit_seconds - seconds, 0.01))):
        name, seconds = connecting_for() or longest_wait(recorded(), time.time_ns()) or ("", 0.0)
        limit = watch.limit_seconds  # another one after the first step
        if seconds > limit:
            give_up(
                f"{place(watch)}: {name} is under way for {seconds:.0f} s, longer than comm's limit of "
                f"{limit:g} s: another process died or hangs, or is slower; here "
                f"{line_of(threading.main_thread())}"
            )


def place(watch: Watch) -> str:
    """Say which step and rank this is: `step 7, rank 1`."""
    rank = dist.get_rank() if dist.is_initialized() else world.read_world().rank
    return f"{f'step {watch.step}' if watch.step else 'before the first step'}, rank {rank}"


def reason(error: BaseException) -> str:
    """What a failed collective's error says, in one short line, without the source file that says it."""
    line = str(error).strip().partition("\n")[0]
    text = line.partition("] ")[2] if line.startswith("[") else line
    return f"another process died or gave up ({text[:200]})"


def is_failed_collective(error: BaseException) -> bool:
    """Whether an error comes out of a collective; backward passes them on as plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in CONNECTION_ERRORS)


def recorded() -> list[dict[str, Any]]:
    """The flight recorder's collectives, oldest first; empty where it is off or nothing was communicated."""
    if not dist.is_initialized():
        return []
    recorders = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # gloo's, and NCCL's in builds that have it
    dumps = [getattr(torch._C._distributed_c10d, name, None) for name in recorders]
    entries = [entry for dump in dumps if dump for entry in json.loads(dump()).get("entries", [])]
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def connecting_for() -> tuple[str, float] | None:
    """What this process is connecting, and for how many seconds already; None where it does not."""
    return next(((groups, time.monotonic() - since) for groups, since in list(CONNECTING.items())), None)


def longest_wait(entries: list[dict[str, Any]], now_ns: int) -> tuple[str, float] | None:
    """The oldest collective that is not done and its age in seconds, None where all are."""
    waiting = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
    if not waiting:
        return None
    oldest = min(waiting, key=lambda entry: entry["time_created_ns"])
    return _named(oldest), (now_ns - oldest["time_created_ns"]) / 1e9


def _last_collective() -> str:
    """The collective that failed: the first that is not done, else the last."""
    entries = recorded()
    stuck = longest_wait(entries, 0)
    if stuck is not None:
        return stuck[0]
    return _named(entries[-1]) if entries else "a collective"


def _named(entry: dict[str, Any]) -> str:
    """Name a collective: `all_gather #12 of group dp_shard`, by its count in the group."""
    operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    return f"{operation} #{entry['collective_seq_id']} of group {entry['process_group'][1]}"


def line_of(thread: threading.Thread) -> str:
    """The line of this package that a thread is at: `in step.py:57 train_step`."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame)
    ours = [call for call in stack if call.filename.startswith(PACKAGE) and call.name != "line_of"]
    return f"in {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno} {ours[-1].name}" if ours else "outside of it"
