"""What all commands share: a parser, the log, signals, and one way to end."""

import argparse
import atexit
import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from titan_moe.runtime import compat
from titan_moe.runtime.errors import CollectiveError, describe, is_out_of_memory
from titan_moe.runtime.world import Runtime, close_process_group, read_world, world_size

logger = logging.getLogger("titan_moe")
TRUST = "--trust_components"


class Parser(argparse.ArgumentParser):
    """argparse, with ValueError of one line for a mistake in the command line, and without abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} (--help lists the arguments)")

    def add_trust(self) -> None:
        """Add --trust_components, for commands that build from the configuration of a checkpoint."""
        self.add_argument(
            TRUST,
            nargs="+",
            default=[],
            metavar="MODULE",
            help="modules or packages whose code the checkpoint's configuration may name and run here (none)",
        )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def init_logging(runtime: Runtime) -> None:
    """Send the package's log to stderr: everything of rank 0, warnings of the others."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if runtime.world_size == 1 or runtime.is_main else f"[rank {runtime.rank}] "
    handler.setFormatter(_Formatter(prefix + "%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if runtime.is_main else logging.WARNING)


class StopRequest:
    """Note SIGINT and SIGTERM, so that the loop can stop after the step and save.

    Later signals are ignored: torchrun passes on what the terminal has sent to the workers already.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def on_any_rank(self, other: bool = False) -> tuple[int, bool]:
        """Give the signal that any process received, 0 for none, and whether `other` holds on any; alike on every rank.

        The flags are reduced over the hosts (gloo), which does not wait for a GPU.
        """
        if world_size() == 1:
            return self.signal, other
        flags = torch.tensor([self.signal, int(other)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, any_other = flags.tolist()
        return number, bool(any_other)


def signal_name(number: int) -> str:
    """Name a signal: 15 -> SIGTERM."""
    return signal.Signals(number).name


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command's main(): exit 0 on success, 2 with one `error:` line for a user's error, 1 on a fault.

    TITAN_MOE_DEBUG=1 shows the traceback of a user's error too.
    """
    faulthandler.enable()
    debug = os.environ.get("TITAN_MOE_DEBUG") == "1"

    # Output is flushed inside: a reader that has left is known only then.
    try:
        compat.check_torch()
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left, as `| head` does. Other commands end then without a word; Python would
        # complain when it flushes at its end, so the output leads nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        # Most users' errors are the same on all ranks. One line a node is enough, and needed: a disk may fail on one.
        if debug:
            traceback.print_exc()
        if read_world().local_rank == 0 or debug:
            print(f"error: {describe(error)}", file=sys.stderr)
        code = 2
    except CollectiveError as error:
        # The others wait for ever in a collective that this process has left, so nothing more is waited for.
        if debug:
            traceback.print_exc()
        give_up(describe(error))
    except (MemoryError, RuntimeError) as error:
        # Memory may run out on one rank alone: it says which, and ends without the others. The rest are faults.
        if not is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        rank_text = f" on rank {read_world().rank}" if read_world().world_size > 1 else ""
        give_up(
            f"out of memory{rank_text} ({describe(error)[:200]}): lower training.local_batch_size or training.seq_len; "
            "python -m titan_moe.estimate says what a configuration takes",
            code=2,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    finally:
        close_process_group()
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process as Python does, but without taking the interpreter down.

    A thread of gloo may still hold the tensors of its last collective, and needs the interpreter's lock to free them.
    If the interpreter is going down by then, Python ends that thread in a way that aborts the process: a run that has
    finished and written everything would count as failed (1 of 15 on a busy machine).
    """
    threading._shutdown()  # pyrefly: ignore[missing-attribute]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def give_up(message: str, code: int = 1) -> NoReturn:
    """End this process at once with one line. Threads that wait for a process that is gone would wait for ever."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
