"""What every command does: its words, its log, its signals, and one way to end."""

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
    """argparse, with a mistake in the command line as a ValueError of one line; no abbreviations."""

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
    """Notes SIGINT and SIGTERM, so that the loop can stop after the step and save.

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
    try:
        compat.check_torch()
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left, as `| head` does: end like other commands, quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        if read_world().local_rank == 0 or debug:  # one line a node: a disk may fail on one of them alone
            print(f"error: {describe(error)}", file=sys.stderr)
        code = 2
    except CollectiveError as error:
        if debug:
            traceback.print_exc()
        give_up(describe(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        where = f" on rank {read_world().rank}" if read_world().world_size > 1 else ""
        give_up(
            f"out of memory{where} ({describe(error)[:200]}): lower training.local_batch_size or training.seq_len; "
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
    """End this process as Python does, but for taking the interpreter down.

    A thread of gloo may still hold the tensors of its last collective. To let go of them it asks for the interpreter's
    lock, and where the interpreter is going down already, Python ends that thread in a way that aborts the process:
    a run that has finished and written everything counts as failed (1 of 15 on a busy machine).
    """
    threading._shutdown()  # pyrefly: ignore[missing-attribute]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def give_up(message: str, code: int = 1) -> NoReturn:
    """End this process at once with one line: what waits for another process that is gone would wait for ever."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
