"""One process at a time: locks on files that end with their process, however it ends, and that say who holds them.

The lock is the kernel's (flock, over NFS too). Some file systems have no locks, or a separate one on each node. There a
holder shows that it lives by renewing the time of the file. Clocks of two hosts are never compared: a time that changes
is a sign of life, whatever it is.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

RUN_LOCK = ".run.lock"  # in the dump folder of a run that is going
PATIENCE_SECONDS = 5.0  # a process that was killed holds its locks until its memory is freed
HEARTBEAT_SECONDS = 5.0
_held: set[IO[str]] = set()


def _close_in_child() -> None:
    """Close the lock files in a forked worker, which may live longer: a lock is held until the last copy is closed."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_close_in_child)


def try_lock(file: IO[Any]) -> bool:
    """Take the lock of an open file; False where another process has it. Without locks of files: OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file; False, too, where the file system has no locks."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # does not keep others who ask from an answer
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def sole_process(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`. It is removed afterwards, and so are folders that were made for it and are empty.

    Raises ValueError, one line on `what`, where another process holds it. A file that a dead process has left is taken
    over: at once if it ran on this machine, else after three heartbeats without a sign of life.
    """
    # Folders that are made for the lock alone are to go with it, so they are noted before they are made.
    new_folders = [folder for folder in path.parents if not folder.exists()]
    ended = threading.Event()
    try:
        file = _take(path, what)
        _held.add(file)

        # The heartbeat is for other nodes, to which the kernel's lock may say nothing. A daemon thread: a process that
        # crashes must not be kept alive by it.
        beat = threading.Thread(target=_beat, args=(file, ended), name="lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _held.discard(file)

            # Removed before it is unlocked: whoever has opened it in the meantime will see that `path` is another file.
            with contextlib.suppress(OSError):
                if not file.closed and _is_file_of(path, file):  # a forked worker's is closed
                    path.unlink()
            file.close()
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty
            for folder in new_folders:
                folder.rmdir()


def _take(path: Path, what: str) -> IO[str]:
    """Open and lock the file, and write into it who has it."""
    # Another process may be ending just now. It is given some seconds, with a new look at the file in each round, as
    # the file itself may be another one by then.
    limit = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            except (FileNotFoundError, FileExistsError):  # a run that has ended is removing the folder it made
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)
                continue

            # Locked by another process: it may just have been killed, so a few seconds are waited for its memory to go.
            locked, holder = _lock_if_possible(file), _read(file)
            if locked is None:
                if time.monotonic() > limit:
                    raise ValueError(_in_use(path, what, holder))

            # Not locked, but a holder's name is in it. On this machine it is that of a dead one, which would else have
            # the lock; on another machine, or without locks, only signs of life can tell.
            elif holder and not (locked and holder.get("boot") == _boot()) and _is_alive(path, holder):
                raise ValueError(_in_use(path, what, holder))

            # Ours, unless its holder has removed it between the opening and the lock: then another round.
            elif _is_file_of(path, file):
                _write(file)
                stack.pop_all()
                return file
        time.sleep(0.05)


def _lock_if_possible(file: IO[str]) -> bool | None:
    """Take the lock: True; False where the file system has no locks, None where another process holds this one."""
    try:
        return True if try_lock(file) else None
    except OSError as error:
        logger.info("no file locks in %s (%s): signs of life in the lock file count", file.name, error.strerror)
        return False


def _is_file_of(path: Path, file: IO[str]) -> bool:
    """Whether `file` still is what `path` names: the process that held it may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    """Watch the file's time for three heartbeats: whether it changes, which only a living holder makes it do."""
    # Nothing seems to happen for up to 15 seconds, so the user is told why.
    limit = time.monotonic() + 3 * HEARTBEAT_SECONDS
    logger.info(
        "%s is of process %s on host %s: looking for a sign of life for %g s",
        *(path, holder.get("pid"), holder.get("host"), 3 * HEARTBEAT_SECONDS),
    )

    # Any other time is a sign of life: it is not compared with this host's clock. A file that is gone has no holder.
    before = _time_of(path)
    while time.monotonic() < limit:
        time.sleep(HEARTBEAT_SECONDS / 10)
        now = _time_of(path)
        if now is None or now != before:
            return now is not None
    return False


def _time_of(path: Path) -> int | None:
    """When the file was last touched, None where it is gone. It is opened for that: NFS then asks its server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat(file: IO[str], ended: threading.Event) -> None:
    """Renew the file's time until `ended`."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # a full or stalled disk: the next one may come through
            os.utime(file.fileno())


def _read(file: IO[str]) -> dict[str, Any]:
    """Who holds the file, empty where it does not say."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(file: IO[str]) -> None:
    since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "since": since}) + "\n")
    file.flush()


def _boot() -> str:
    """An id of this machine since it was started, alike in all of its containers: the kernel's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _in_use(path: Path, what: str, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on host {holder.get('host')}, since {holder.get('since')}"
    return f"{what} is in use by {who} ({path}): wait until it has ended, or give another one"
