"""The machine: process group, device, seeds and determinism, logging. The only reader of os.environ."""

import atexit
import ctypes
import datetime
import faulthandler
import logging
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from titan_moe import __version__, compat
from titan_moe.gpus import find_gpu
from titan_moe.world import seed_of, world_size

logger = logging.getLogger("titan_moe")
T = TypeVar("T")


class Runtime(NamedTuple):
    """Where this process runs."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1  # processes of this node

    @property
    def is_main(self) -> bool:
        """Whether this process writes the metrics and speaks to the user."""
        return self.rank == 0


def read_world() -> Runtime:
    """Rank, world size and device as torchrun set them; one process when it did not."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(*item)) for item in names.items())
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Runtime(rank, world_size, local_rank, device, local_world_size)


def worker_environment(*, threads: int, devices: Sequence[int] = ()) -> dict[str, str]:
    """Environment of a training process that this one starts: its CPU threads, and its GPUs, empty: as here.

    Nothing of a torchrun that this process itself may run under goes along.
    """
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    if devices:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launch} | own


class CollectiveError(RuntimeError):
    """A collective that failed, because another process died or hangs."""


# torch ends a process on its own limit with pages of stacks: a minute after ours, which `titan_moe.watch` keeps.
GRACE_SECONDS = 60


def init_process_group(runtime: Runtime, timeout_seconds: int) -> None:
    """Start the default process group: gloo on a CPU, NCCL (with gloo for CPU tensors) on GPUs."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder's last collectives
    backend = "cuda:nccl,cpu:gloo" if runtime.device.type == "cuda" else "gloo"
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    timeout = datetime.timedelta(seconds=timeout_seconds + GRACE_SECONDS)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def close_process_group() -> None:
    """Take the process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(timeout_seconds: int) -> None:
    """Change the timeout of the collectives of every group (another one once training is under way)."""
    if world_size() > 1:
        for group in list(dist.distributed_c10d._world.pg_map):
            compat.set_group_timeout(datetime.timedelta(seconds=timeout_seconds + GRACE_SECONDS), group)


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """Give every process the small Python value of each."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(task: Callable[[], object], runtime: Runtime) -> None:
    """Run `task` on the main process; a user's error in it is a ValueError on every process, so that all end alike."""
    text, failure = None, None
    if runtime.is_main:
        try:
            task()
        except (ValueError, OSError) as error:
            text, failure = describe(error), error
    text = all_gather(text)[0]
    if text is not None:
        raise ValueError(text) from failure


def caution_restarts() -> None:
    """Warn where torchrun would restart workers on the store of the first start, on which restarts fail or hang."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        logger.warning(
            "torchrun --max_restarts %d: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started, "
            "or a restart can fail or hang",
            restarts,
        )


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python's, NumPy's and torch's generators; with `deterministic`, refuse kernels that are not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # a pass over all memory that is made, and nothing here reads what it has not written
        torch._C._set_deterministic_fill_uninitialized_memory(False)
        torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one training step: what it draws does not depend on the steps before it."""
    torch.manual_seed(seed_of(f"{seed}/{step}/{rank}"))


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


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: allocated on the GPU, or resident in the process on a CPU."""
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


def check_writable(folder: Path) -> None:
    """Raise ValueError where the folder of a run cannot be written or made; leaves nothing behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"job.dump_folder {folder} is not writable: {error.strerror}: {existing}; give another one"
        ) from error


def describe_machine(runtime: Runtime) -> dict[str, Any]:
    """Versions, git commit, world size and device, for run.json."""
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the GPU or of the host, was asked for that is not there."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe(error: Exception) -> str:
    """One line that says what went wrong; what a terminal would obey, in a name from a file, is shown escaped."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))


def c_compiler() -> str | None:
    """The C compiler that Triton builds its launchers with, None where there is none."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def user_cache_folder() -> Path:
    """Folder for tokenized data: $XDG_CACHE_HOME/titan_moe, by default ~/.cache/titan_moe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_moe"
