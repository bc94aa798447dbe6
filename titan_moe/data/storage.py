"""The cache folder: whole files with checksums, locks that end with their process, errors of one clear line."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO

from titan_moe.runtime.files import crc32_of, crc32_of_json, new_file, warn_once, write_atomic

log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file of the cache that is not what was written; its text names the file."""


@contextlib.contextmanager
def made_anew() -> Generator[None, None, None]:
    """Leave the block with a warning where a file is damaged: everything in the cache folder can be made again."""
    try:
        yield
    except DamagedError as error:
        warn_once(f"{error}: it is made anew")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file with its checksum under the key `crc32`, whole or not at all."""
    write_atomic(path, json.dumps({**content, "crc32": crc32_of_json(content)}))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote, or JSON of a version that had no checksums; None where there is no such file.

    Raises DamagedError.
    """
    # After a power cut a file may hold anything, well-formed JSON of another shape included.
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        crc32 = content.pop("crc32", None)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: not JSON of ours") from error
    if crc32 not in (None, crc32_of_json(content)):
        raise DamagedError(f"{path} is damaged: it does not have its checksum")
    return content


@contextlib.contextmanager
def new_checked_file(path: str) -> Generator[BinaryIO, None, None]:
    """Open a file to be written whole or not at all, with a file PATH.crc32 beside it for `check_file`."""
    with new_file(Path(path)) as file:
        yield file
        file.flush()
        write_atomic(Path(f"{path}.crc32"), crc32_of(Path(file.name)))


def check_file(path: str) -> None:
    """Raise DamagedError where a file is not what `new_checked_file` wrote.

    A file of a version that had no checksums is taken as it is, and gets one.
    """
    checksum, checksum_path = crc32_of(Path(path)), Path(f"{path}.crc32")
    if not checksum_path.exists():
        with contextlib.suppress(OSError):  # a folder that is only read
            write_atomic(checksum_path, checksum)
    elif checksum_path.read_bytes() != checksum.encode():
        raise DamagedError(f"{path} is damaged: it does not have its checksum")


def is_usable(path: str) -> bool:
    """Whether a file of `new_checked_file` is there and intact; a damaged one is warned of."""
    if os.path.exists(path):
        with made_anew():
            check_file(path)
            return True
    return False


@contextlib.contextmanager
def locked(path: str | Path) -> Generator[None, None, None]:
    """Hold a file lock that ends with this process, however it ends; where the file system has none, go on without."""
    # First without waiting, only to be able to say that it waits.
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is building %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.info("no file locks for %s (%s): two runs may do the same work", path, error.strerror)
        yield


@contextlib.contextmanager
def storage_errors(folder: str) -> Generator[None, None, None]:
    """Turn errors of the file system into one line that names the cache folder and says what to do.

    Only the file system's errors have a number; those without one are lines for the user already.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = f"{'free some space there' if full else 'make it writable'} or choose another with --data.cache_folder"
        raise OSError(f"data.cache_folder ({folder}): {error.strerror}: {advice}") from error
