"""Files that are whole or absent: atomic writes, removal of what killed ones leave, whole appends, checksums, names."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

logger = logging.getLogger(__name__)

# .NAME.MACHINE-PID-START.tmp: the file that a process writes before it renames it to NAME
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-(\d+)\.tmp")
ABANDONED_SECONDS = 24 * 3600  # another machine's temporary file that nobody has written to for so long is left over


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that a crash or a full disk leaves the old file or the new one, never a part.

    Raises OSError as the file system does, with nothing left behind.
    """
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in the block; then it is on the disk as `path`, or gone where the block raises."""
    # The data is synced before the name changes: else a power cut could leave the new name on an empty file.
    remove_leftovers(path.parent)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

    # The name is an entry of the folder, which has to be synced by itself.
    fsync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """The path of the temporary file or folder that becomes `path`: hidden beside it, with the process in its name."""
    pid = os.getpid()
    return path.with_name(f".{path.name}.{_machine()}-{pid}-{_start_of(pid) or 0}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders (`temporary_path`) in `folder` whose process is gone.

    Processes of another machine that shares the disk, or of another container, cannot be seen. Theirs are removed
    after ABANDONED_SECONDS without a change.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be listed, or is not there: whoever writes there will say
        for path in folder.iterdir():
            if (match := _TEMPORARY.fullmatch(path.name)) and _is_left_over(path, match):
                remove(path)


def _is_left_over(path: Path, match: re.Match[str]) -> bool:
    machine, pid, start = match.groups()
    if machine == _machine():
        now = _start_of(int(pid))  # of another process, perhaps, that has got the number since
        return now is None or (now != int(start) and 0 not in (now, int(start)))
    changes = [os.lstat(name).st_mtime for name in (path, *path.rglob("*"))]
    return time.time() - max(changes) > ABANDONED_SECONDS


@functools.cache
def _machine() -> str:
    """Eight digits that are the same wherever a process id means the same process: this boot, this container."""
    boot, container = "", ""
    with contextlib.suppress(OSError):  # Linux has both
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        container = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {boot} {container}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot, 0 where that is unknown; None if it is gone."""
    # Signal 0 only asks. A process of another user refuses it, and so is alive.
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass

    # A process' name may hold spaces and brackets, so fields are counted after its last bracket. Zombies have ended.
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return None if state in "ZX" else int(fields[18])


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with all that can be removed of it.

    What can't be removed stays, with one warning: it takes room, but nothing reads it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        warn_once(f"cannot remove {path}, which nothing reads any more: {error.strerror}: remove it by hand")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, unless this process has logged the same text before."""
    logger.warning(text)


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path` and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the names in `folder` (new, renamed, removed) are on the disk, if its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def is_plain_name(name: str) -> bool:
    """Whether `name` is that of a file in a folder, without a way out of it: no `/`, no `..`."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def crc32_of(path: Path, start: int = 0, size: int = -1) -> str:
    """CRC-32 of `size` bytes of a file from byte `start` on (-1: all), as eight hexadecimal digits, 1 MiB at a time."""
    crc, buffer, left = 0, bytearray(1 << 20), size if size >= 0 else sys.maxsize
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(view[: min(left, len(buffer))]):
            crc = zlib.crc32(view[:count], crc)
            left -= count
    return f"{crc:08x}"


def crc32_of_json(value: object) -> str:
    """CRC-32 of a value as JSON, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


class Appender(NamedTuple):
    """Functions that append pieces to a file, each whole or not at all, wait until they are on the disk, and close it.

    A piece is with the kernel when `append` returns. If it raises OSError, no part of the piece is in the file; it is
    kept, and written before the next one or by `close`, which syncs, too.
    """

    append: Callable[[bytes], None]
    sync: Callable[[], None]
    close: Callable[[], None]


def appender(path: Path) -> Appender:
    """Open `path` to append to it; it is created where it does not exist."""
    # Without a buffer a piece is with the kernel when `write` returns, so a killed process loses none.
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    fsync_folder(path.parent)
    size = file.seek(0, os.SEEK_END)
    waiting: deque[bytes] = deque()

    # The disk may take a part of a piece before it is full. That part is cut off, and the whole piece waits for the
    # next try, so that no line is torn and none is lost.
    def flush() -> None:
        nonlocal size
        while waiting:
            piece = memoryview(waiting[0])
            try:
                while piece:
                    piece = piece[file.write(piece) :]
            except OSError:
                file.truncate(size)
                raise
            size += len(waiting.popleft())

    def append(piece: bytes) -> None:
        waiting.append(piece)
        flush()

    def sync() -> None:
        os.fsync(file.fileno())

    def close() -> None:
        with file:
            flush()
            sync()

    return Appender(append, sync, close)


def check_writable(folder: Path, key: str = "job.dump_folder") -> None:
    """Raise ValueError, which names the key, where a folder cannot be written or made; leaves nothing behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{key} {folder} is not writable: {error.strerror}: {existing}; give another one") from error
