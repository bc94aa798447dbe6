"""Files behind URLs (s3://bucket/key), by fsspec: one way to open them, to try again, and to say what went wrong."""

import functools
import logging
import random
import time
from collections.abc import Callable, Iterator
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)
T = TypeVar("T")
P = TypeVar("P", bound=Path | str)

# What each protocol needs beside fsspec, which comes with torch.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "https": "aiohttp",
    "http": "aiohttp",
    "memory": "fsspec",
}
IN_EXTRA = ("s3fs", "huggingface_hub")  # what `titan_moe[remote]` installs
WITH_FOLDERS = ("memory",)  # protocols whose folders must be made; in an object store they are beginnings of names
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 30.0  # seconds; each wait is twice the one before
BLOCK_BYTES = 16 << 20  # of one request
# Errors of the stores' libraries that trying again does not mend, by the names of their classes: the libraries may be
# missing.
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "LocalTokenNotFoundError",
    "CredentialRetrievalError",
    "ProfileNotFound",
}
VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "generation", "checksum", "content_md5", "mtime", "created")


class RemoteError(OSError):
    """A file behind a URL that could not be read or written; its text is one line for the user."""


class RemoteFile(NamedTuple):
    """A file behind a URL; `version` changes with its content: the store's etag or checksum, else its time."""

    url: str
    size: int
    version: str


def is_url(path: object) -> bool:
    """Whether a path names something behind a protocol."""
    return isinstance(path, str) and "://" in path


def local_or_url(text: str) -> Path | str:
    """A URL as it is, else a Path: the type of an argument that takes either."""
    return text if is_url(text) else Path(text)


def joined(folder: P, name: str) -> P:
    """The path or the URL of `name` in a folder."""
    result: Any = folder / name if isinstance(folder, Path) else f"{str(folder).rstrip('/')}/{name}"
    return result


def check_url(url: str, key: str) -> None:
    """Raise ValueError where a URL can't be used here: its protocol, a secret in it, a missing package."""
    # Whatever a run reads stands in its config.toml and its log, so a URL must not be what opens the door.
    protocol = url.partition("://")[0]
    parts = urlsplit(url)
    if parts.password or parts.username or (protocol in ("http", "https") and parts.query):
        place = f"{protocol}://{parts.hostname or ''}{parts.path}"
        raise ValueError(
            f"{key} {place}: the URL holds a user or a secret, which would be written into config.toml: leave it out, "
            "and give credentials by the environment"
        )
    if "::" in url or protocol not in PACKAGES:
        raise ValueError(f"{key} {url}: no protocol that is read here: there are {', '.join(PACKAGES)}")
    package = PACKAGES[protocol]
    try:
        __import__(package)
    except ImportError:
        name = "'titan_moe[remote]'" if package in IN_EXTRA else package
        raise ValueError(f"{key} {url}: {protocol}:// needs {package}: pip install {name}") from None


def filesystem(url: str, key: str) -> tuple[Any, str]:
    """The file system of a URL, without what it remembers of listings, and the path there; ValueError as `check_url`.

    Credentials and endpoints are those of the store's own tools: environment variables and files of the user.
    """
    from fsspec.core import url_to_fs

    check_url(url, key)
    fs, path = attempt(lambda: url_to_fs(url), f"{key} {url}")
    fs.invalidate_cache()
    return fs, path


def attempt(task: Callable[[], T], what: str) -> T:
    """Do something with a store, again with growing waits while it is busy or cannot be reached, up to `TRIES` times.

    Raises RemoteError, in one line that begins with `what`.
    """
    for number in range(1, TRIES + 1):
        try:
            return task()
        except RemoteError:
            raise
        except Exception as error:
            if number == TRIES or _is_final(error):
                tries = f" (tried {number} times)" if number > 1 else ""
                raise RemoteError(f"{what}: {explain(error)}{tries}") from error

            # Not all processes at the same moment: that is what a busy store asks for.
            wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * random.Random().uniform(0.5, 1.5)
            logger.info("%s: %s: trying again in %.1f s", what, explain(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, TypeError)
    return isinstance(error, final) or type(error).__name__ in NO_CREDENTIALS


def explain(error: BaseException) -> str:
    """An error of a store in a few words of one line."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if name in NO_CREDENTIALS:
        return f"no credentials ({text}): set them as for the store's own tools, e.g. AWS_ACCESS_KEY_ID"
    if isinstance(error, FileNotFoundError):
        return f"no such file, folder or bucket{f' ({text})' if 'bucket' in text else ''}"
    if isinstance(error, PermissionError):
        return f"access denied ({text})"
    return f"{name}: {text}" if text else name


def find(url: str, key: str) -> tuple[list[str], str]:
    """The URLs of the files that a URL names, sorted, and the URL of the folder where it is one, else "".

    It names a file, a glob, or a folder, which is searched through. Raises RemoteError where there is nothing, and for
    a bucket that can't be read.
    """
    fs, path = filesystem(url, key)
    root, what = "", f"{key} {url}"
    if has_magic(path):
        names = attempt(lambda: fs.glob(path, detail=True), what)
    else:
        if _is_file(attempt(lambda: fs.info(path), what)):
            return [url], ""
        names, root = attempt(lambda: fs.find(path, detail=True), what), fs.unstrip_protocol(path)
    return sorted(fs.unstrip_protocol(name) for name, info in names.items() if _is_file(info)), root


def _is_file(info: dict[str, Any]) -> bool:
    return info["type"] == "file" and not info["name"].endswith("/")  # an empty object that stands for a folder


def stat(url: str, key: str) -> RemoteFile:
    """Size and version of a file; RemoteError where there is none."""
    fs, path = filesystem(url, key)
    info = attempt(lambda: fs.info(path), f"{key} {url}")
    if not _is_file(info):
        raise RemoteError(f"{key} {url}: a folder, not a file")
    version = next((str(info[name]) for name in VERSION_KEYS if info.get(name) is not None), "")
    return RemoteFile(url, int(info["size"]), version.strip('"'))


def exists(url: str, key: str) -> bool:
    """Whether there is a file or a folder of this URL."""
    fs, path = filesystem(url, key)
    return attempt(functools.partial(fs.exists, path), f"{key} {url}")


def blocks(url: str, size: int, key: str) -> Iterator[bytes]:
    """The `size` bytes of a file, a block at a time; each is asked for again where the answer is cut off."""
    fs, path = filesystem(url, key)
    for start in range(0, size, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, size)

        def read(start: int = start, stop: int = stop) -> bytes:
            data = fs.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise EOFError(f"{len(data):,} of {stop - start:,} bytes came from byte {start:,} on")
            return data

        yield attempt(read, f"{key} {url}")
