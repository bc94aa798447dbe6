"""Data files behind URLs: fetched into the cache folder, whole or not at all, and known again by what they are.

A fetched file lies in `remote/` of the cache folder, in a folder named by its URL, size and version (the store's etag).
So an object that has changed is another file, and one that has not is fetched once. The hash of its content is
remembered when the file itself is removed, for the cache of its tokens is named by it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from titan_moe.data.storage import locked, made_anew, read_sealed, storage_errors, write_sealed
from titan_moe.runtime.files import new_file, remove_leftovers
from titan_moe.runtime.remote import RemoteError, RemoteFile, blocks, is_url, stat

REMOTE, MEMO = "remote", "remote_hashes.json"
FETCHERS = 4  # files at a time
HASH_BYTES = 16
KEY = "data.path"
log = logging.getLogger(__name__)


class StoppedError(Exception):
    """The fetching of a file was called off."""


def stat_all(paths: Sequence[str]) -> list[RemoteFile]:
    """Size and version of files; of local ones the version is empty. Raises OSError of one line."""
    with ThreadPoolExecutor(4 * FETCHERS) as pool:
        return list(pool.map(_stat, paths))


def _stat(path: str) -> RemoteFile:
    return stat(path, KEY) if is_url(path) else RemoteFile(path, os.path.getsize(path), "")


def place_of(file: RemoteFile, folder: str) -> str:
    """Where a file lies once it is fetched; a local one where it is."""
    return _place([file], folder) if is_url(file.url) else file.url


def _place(files: Sequence[RemoteFile], folder: str) -> str:
    """Where the first of some files lies once they are fetched into a folder of their own."""
    identity = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    return os.path.join(folder, REMOTE, identity, os.path.basename(files[0].url))


def known_hashes(files: Sequence[RemoteFile], folder: str) -> list[str | None]:
    """Content hashes of files that were fetched once; None for one that was not."""
    with storage_errors(folder), made_anew():
        memo = read_sealed(Path(folder) / MEMO) or {}
        return [memo.get(json.dumps(file)) for file in files]
    return [None] * len(files)


class Fetcher:
    """Fetches files in threads, in the order in which they are asked for."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
        self._begun: dict[str, Future[str]] = {}
        self._stopped = threading.Event()
        self._memo = threading.Lock()
        for path in Path(folder, REMOTE).glob("*"):
            remove_leftovers(path)  # of a process that was killed
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()

    def begin(self, places: Iterable[tuple[RemoteFile, str]]) -> list[Future[str]]:
        """Begin to fetch files to their places; the results are these paths."""
        return [self._submit(file, path) for file, path in places]

    def close(self) -> None:
        """Call off what is not fetched yet."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, file: RemoteFile, path: str) -> "Future[str]":
        # Two sources may have a file in common.
        if path not in self._begun or not is_whole(file, path):
            self._begun[path] = self._pool.submit(self._fetch, file, path)
        return self._begun[path]

    def _fetch(self, file: RemoteFile, path: str) -> str:
        if is_whole(file, path):
            if is_url(file.url) and known_hashes([file], self.folder) == [None]:  # it was killed before it said so
                self._remember(file, hash_content(path))
            return path

        begin, content = time.perf_counter(), hashlib.blake2b(digest_size=HASH_BYTES)
        with storage_errors(self.folder):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with new_file(Path(path)) as target:
                for block in blocks(file.url, file.size, KEY):
                    if self._stopped.is_set():
                        raise StoppedError
                    content.update(block)
                    target.write(block)

                # Blocks are asked for one by one: of an object that was replaced meanwhile they would not fit.
                if stat(file.url, KEY) != file:
                    raise RemoteError(f"{KEY} {file.url}: changed while it was fetched: start again when it is whole")
        self._remember(file, content.hexdigest())
        log.info("fetched %s: %.1f MB in %.1f s", file.url, file.size / 1e6, time.perf_counter() - begin)
        return path

    def _remember(self, file: RemoteFile, content: str) -> None:
        path = Path(self.folder) / MEMO
        with self._memo, storage_errors(self.folder), locked(f"{path}.lock"):
            memo = {}
            with made_anew():
                memo = read_sealed(path) or {}
            write_sealed(path, {**memo, json.dumps(file): content})


def is_whole(file: RemoteFile, path: str) -> bool:
    """Whether a file is at its place: it gets its name when it is whole."""
    return not is_url(file.url) or (os.path.exists(path) and os.path.getsize(path) == file.size)


@contextmanager
def fetcher(folder: str) -> Iterator[Fetcher]:
    """A Fetcher, whose threads end with the block; one at a time for each cache folder."""
    # Two runs would fetch the same, and the first one to be done would take the files from the other.
    with storage_errors(folder), locked(Path(folder) / REMOTE / "lock"):
        fetch = Fetcher(folder)
        try:
            yield fetch
        finally:
            fetch.close()


def fetch_all(paths: Sequence[str], folder: str) -> list[str]:
    """The local paths of files, those behind URLs fetched into the cache folder, where they stay."""
    if not any(map(is_url, paths)):
        return [*paths]

    # Megatron's pair is found by its names: the two lie in one folder, which is another one when either has changed.
    indices = [f"{path[:-4]}.idx" if is_url(path) and path.endswith(".bin") else path for path in paths]
    places: list[tuple[RemoteFile, str]] = []
    results = []
    for file, index in zip(stat_all(paths), stat_all(indices), strict=True):
        results.append(file.url if not is_url(file.url) else _place(list(dict.fromkeys([file, index])), folder))
        places.append((file, results[-1]))
        if index != file:
            places.append((index, f"{results[-1][:-4]}.idx"))
    with fetcher(folder) as fetch:
        for future in fetch.begin(places):
            future.result()
    return results


def forget(files: Iterable[RemoteFile], folder: str) -> None:
    """Remove fetched files; what they hold is still known by its hash."""
    for file in files:
        if is_url(file.url):
            shutil.rmtree(os.path.dirname(place_of(file, folder)), ignore_errors=True)


def hash_content(path: str) -> str:
    """The content hash of a local file; raises the file system's OSError."""
    # A block at a time, whatever the size of the file, and not buffered twice.
    content = hashlib.blake2b(digest_size=HASH_BYTES)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()
