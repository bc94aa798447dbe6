"""Files that are whole or absent: atomic writes, whole appends, folders on disk for good, checksums, names."""

import errno
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that a crash or a full disk leaves the old file or the new one, never a part.

    Raises OSError as the file system does, with nothing left behind.
    """
    write_pieces_atomic(path, [text.encode("utf-8")])


def write_pieces_atomic(path: Path, pieces: Iterable[bytes]) -> None:
    """Write `pieces`, one after the other, to `path` as `write_atomic` does; they may be read from `path` itself."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path` and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the names in `folder` (new, renamed, removed) are on the disk, where its file system can do that."""
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


def crc32_of(path: Path) -> str:
    """CRC-32 of a file's bytes, as eight hexadecimal digits; reads in pieces of 1 MiB."""
    crc, buffer = 0, bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            crc = zlib.crc32(view[:size], crc)
    return f"{crc:08x}"


class Appender(NamedTuple):
    """Functions that append pieces to a file, each whole or not at all, wait until they are on the disk, and close it.

    A piece is with the kernel when `append` returns. If it raises OSError, no part of the piece is in the file; it is
    kept, and written before the next one or by `close`, which syncs, too.
    """

    append: Callable[[bytes], None]
    sync: Callable[[], None]
    close: Callable[[], None]


def appender(path: Path) -> Appender:
    """Open `path` to append to it; it is made where it does not exist."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    fsync_folder(path.parent)
    size = file.seek(0, os.SEEK_END)
    waiting: deque[bytes] = deque()

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
