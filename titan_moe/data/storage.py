"""Writing into the cache folder: whole files only, locks that end with their process, one clear line when it fails."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Generator
from pathlib import Path

log = logging.getLogger(__name__)


def temporary_name(path: str | Path) -> str:
    """Return the name under which this process writes a file before it gets its own."""
    return f"{path}.tmp-{os.getpid()}"


def write_whole(path: str | Path, content: str) -> None:
    """Write a small text file under a temporary name, then rename it: under its own name it is always whole."""
    with open(temporary_name(path), "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary_name(path), path)


@contextlib.contextmanager
def locked(path: str | Path) -> Generator[None, None, None]:
    """Hold a file lock that ends with this process, however it ends; where the file system has none, go on without."""
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

    Only errors with a number are the file system's; those without one are lines for the user already.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = f"{'free some space there' if full else 'make it writable'} or choose another with --data.cache_folder"
        raise OSError(f"data.cache_folder ({folder}): {error.strerror}: {advice}") from error
