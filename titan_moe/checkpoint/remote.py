"""Steps behind a URL: in an object store, which can't rename, a step is whole when its manifest is there.

The files of a save are written to where they stay, `URL/step-N/`, each rank its own, and summed up on their way. First
comes an empty object `.unfinished`, last `manifest.json`. So what has the first without the second is a save or a
removal that was cut short, and goes when the next save begins; nothing else is removed. To be read a step is fetched to
the disk, into the user's cache folder.
"""

import hashlib
import io
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase

from titan_moe.checkpoint.folder import (
    MANIFEST,
    STEP,
    CheckpointError,
    manifest_of,
    parse_manifest,
    warn_on_failure,
)
from titan_moe.checkpoint.lazy import StoreErrors
from titan_moe.runtime.files import ABANDONED_SECONDS, new_file
from titan_moe.runtime.machine import user_cache_folder
from titan_moe.runtime.remote import (
    WITH_FOLDERS,
    RemoteError,
    attempt,
    blocks,
    explain,
    filesystem,
    is_url,
    joined,
)

KEY, UNFINISHED, FETCHED = "checkpoint", ".unfinished", "checkpoints"
logger = logging.getLogger(__name__)


class Sums(io.RawIOBase):
    """A stream that passes on what is written to it, and counts and sums it up."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.size, self.crc = stream, 0, 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self.stream.write(view)
        self.crc = zlib.crc32(view, self.crc)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        """The bytes so far."""
        return self.size


class _Files(FileSystemBase):
    """Files behind a URL for DCP's writer, with the manifest's entry of each that was written."""

    def __init__(self, url: str) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._fs, _ = filesystem(url, KEY)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file to write it; errors of the store are OSError."""
        try:
            with self._fs.open(path, mode) as stream:
                sums = Sums(stream)
                yield sums
        except OSError:
            raise
        except Exception as error:
            raise RemoteError(f"{path}: {explain(error)}") from error
        self.entries[os.path.basename(path)] = _entry(sums.size, sums.crc)

    def concat_path(self, path: Any, suffix: str) -> str:
        """The URL of a file in a folder."""
        return joined(str(path), suffix)

    def init_path(self, path: Any) -> Any:
        """The URL as it is."""
        return path

    def mkdir(self, path: Any) -> None:
        """Do nothing: `begin_step` makes folders, where the store has any."""

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file, and its entry."""
        attempt(lambda: self._fs.mv(path, new_path), f"{new_path}")
        self.entries[os.path.basename(new_path)] = self.entries.pop(os.path.basename(path))

    def exists(self, path: Any) -> bool:
        """Whether a file is there."""
        return attempt(lambda: self._fs.exists(path), f"{path}")

    def rm_file(self, path: Any) -> None:
        """Remove a file."""
        attempt(lambda: self._fs.rm_file(path), f"{path}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it is a URL."""
        return is_url(checkpoint_id)


class RemoteWriter(StoreErrors, dcp.FileSystemWriter):
    """DCP's writer to a URL, as its own FsspecWriter is one; `entries` are those of the files that it wrote."""

    def __init__(self, url: str) -> None:
        super().__init__(url, sync_files=False)  # to sync is to sync every local disk
        files: Any = _Files(url)
        self.fs, self.path, self.entries = files, files.init_path(url), files.entries


def _entry(size: int, crc: int) -> dict[str, Any]:
    return {"size": size, "crc32": f"{crc:08x}"}


def write_files(step_url: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Write small files; their entries."""
    fs, path = filesystem(step_url, KEY)
    for name, data in files.items():
        attempt(lambda name=name, data=data: fs.pipe_file(f"{path}/{name}", data), f"{step_url}/{name}")
    return {name: _entry(len(data), zlib.crc32(data)) for name, data in files.items()}


def files_of(url: str) -> dict[str, int]:
    """The sizes of all files below a URL, by their path from there; none where there is nothing."""
    fs, path = filesystem(url, KEY)
    listing = attempt(lambda: fs.find(path, detail=True), f"{KEY} {url}")
    root = len(path.rstrip("/")) + 1
    return {name[root:]: int(info["size"]) for name, info in listing.items() if len(name) > root}


def is_step_folder(url: str) -> bool:
    """Whether a URL is, or was meant to be, that of one step."""
    return STEP.fullmatch(url.rstrip("/").rpartition("/")[2]) is not None or MANIFEST in files_of(url)


def _listing(url: str) -> dict[int, dict[str, int]]:
    """The steps in a folder of them: the sizes of each one's files."""
    steps: dict[int, dict[str, int]] = {}
    for path, size in files_of(url).items():
        folder, _, name = path.partition("/")
        if (match := STEP.fullmatch(folder)) and name:
            steps.setdefault(int(match[1]), {})[name] = size
    return steps


def _read_manifest(step_url: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The manifest of a step whose files all exist with the sizes that it says; else CheckpointError."""
    if MANIFEST not in sizes:
        raise CheckpointError(f"{step_url} is broken: it has no {MANIFEST}")
    body = parse_manifest(_read(step_url, MANIFEST, sizes[MANIFEST]), step_url)
    for name, entry in body["files"].items():
        if sizes.get(name) != entry["size"]:
            wrong = f"has {sizes[name]} bytes, not {entry['size']}" if name in sizes else "is missing"
            raise CheckpointError(f"{step_url} is broken: file {name} {wrong}")
    return body


def _read(step_url: str, name: str, size: int) -> bytes:
    return b"".join(blocks(f"{step_url}/{name}", size, KEY))


def scan(url: str) -> tuple[dict[int, str], dict[int, CheckpointError]]:
    """Steps behind a URL whose files are there with the right sizes, and of each other one what is wrong with it."""
    complete: dict[int, str] = {}
    problems: dict[int, CheckpointError] = {}
    for step, sizes in _listing(url).items():
        if _is_leftover(sizes):
            continue
        try:
            _read_manifest(_step(url, step), sizes)
        except CheckpointError as error:
            problems[step] = error
        else:
            complete[step] = _step(url, step)
    return complete, problems


def _is_leftover(sizes: Mapping[str, int]) -> bool:
    return UNFINISHED in sizes and MANIFEST not in sizes


def _step(url: str, step: int) -> str:
    return joined(url, f"step-{step}")


def begin_step(url: str, step: int) -> str:
    """Make room for a save of `step`; what saves that died have left is removed first."""
    for number, sizes in _listing(url).items():
        if _is_leftover(sizes) or number == step:
            _remove(_step(url, number), sizes)
        elif UNFINISHED in sizes:
            _finish(_step(url, number))
    fs, path = filesystem(_step(url, step), KEY)
    if url.partition("://")[0] in WITH_FOLDERS:
        fs.makedirs(path, exist_ok=True)
    write_files(_step(url, step), {UNFINISHED: b""})
    return _step(url, step)


def publish(step_url: str, body: dict[str, Any]) -> None:
    """Write the manifest, which makes a step of the files."""
    # What the store says it has counts, not what was sent to it.
    sizes = files_of(step_url)
    for name, entry in body["files"].items():
        if sizes.get(name) != entry["size"]:
            raise CheckpointError(f"the store has {sizes.get(name, 'no')} bytes of {name}, not {entry['size']}")
    write_files(step_url, {MANIFEST: manifest_of(body)})
    warn_on_failure(lambda: _finish(step_url))


def _finish(step_url: str) -> None:
    """Remove the mark of a save under way from a step that is whole."""
    fs, path = filesystem(step_url, KEY)
    attempt(lambda: fs.rm_file(f"{path}/{UNFINISHED}"), f"{step_url}/{UNFINISHED}")


def _remove(step_url: str, sizes: Mapping[str, int]) -> None:
    """Remove a step: from the first moment on it is none, and what a killed process leaves of it is known as such."""
    if UNFINISHED not in sizes:
        write_files(step_url, {UNFINISHED: b""})
    fs, path = filesystem(step_url, KEY)
    rest = [name for name in sizes if name not in (MANIFEST, UNFINISHED)]
    for names in ([MANIFEST] if MANIFEST in sizes else [], rest, [UNFINISHED]):
        if names:
            attempt(lambda names=names: fs.rm([f"{path}/{name}" for name in names]), step_url)
    if step_url.partition("://")[0] in WITH_FOLDERS:
        fs.rm(path, recursive=True)


def prune(url: str, step: int, keep_latest_k: int) -> None:
    """Remove steps before `step` but for the latest `keep_latest_k - 1` complete ones."""
    complete, problems = scan(url)
    older = sorted(old for old in complete if old < step)
    to_keep = older[len(older) - (keep_latest_k - 1) :] if keep_latest_k > 1 else []
    listing = _listing(url)
    for old in sorted({*older, *(broken for broken in problems if broken < step)} - {*to_keep}):
        warn_on_failure(lambda old=old: _remove(_step(url, old), listing[old]))


def steps_after(url: str, step: int) -> list[str]:
    """Steps after `step`, whole or broken, oldest first."""
    later = [number for number, sizes in _listing(url).items() if number > step and not _is_leftover(sizes)]
    return [_step(url, number) for number in sorted(later)]


def set_aside(url: str, step: int, name: str) -> list[str]:
    """Move steps after `step` to `url/name/step-N`: copied first, the manifest last, then removed; oldest first."""
    moved = []
    for step_url in steps_after(url, step):
        moved.append(joined(joined(url, name), step_url.rpartition("/")[2]))
        _copy(step_url, moved[-1])
        _remove(step_url, files_of(step_url))
    return moved


def _copy(step_url: str, target_url: str) -> None:
    (fs, path), (_, target) = filesystem(step_url, KEY), filesystem(target_url, KEY)
    if step_url.partition("://")[0] in WITH_FOLDERS:
        fs.makedirs(target, exist_ok=True)
    for name in sorted(files_of(step_url), key=lambda name: name == MANIFEST):
        attempt(lambda name=name: fs.cp_file(f"{path}/{name}", f"{target}/{name}"), f"{step_url}/{name}")


def fetch_step(step_url: str, part: int = 0, parts: int = 1) -> Path:
    """Fetch every `parts`-th file of a step to the disk, checksums compared, unless it is there; the step's path there.

    Copies that were not used for a day are removed. Raises CheckpointError for a step that is broken.
    """
    # Named by the manifest, so that a step that was saved anew is another one.
    sizes = files_of(step_url)
    body = _read_manifest(step_url, sizes)
    manifest = _read(step_url, MANIFEST, sizes[MANIFEST])
    name = hashlib.sha256(step_url.encode() + manifest).hexdigest()[:16]
    target = user_cache_folder() / FETCHED / name / step_url.rstrip("/").rpartition("/")[2]
    target.mkdir(parents=True, exist_ok=True)

    # Its time says that it is in use, to other processes that look for copies that are not.
    os.utime(target.parent)
    for other in target.parent.parent.iterdir():
        if other != target.parent and time.time() - other.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(other, ignore_errors=True)

    # What an interrupted fetch has left whole is not fetched again.
    begin, count = time.perf_counter(), 0
    for file in sorted(body["files"])[part::parts]:
        path, entry = target / file, body["files"][file]
        if not path.exists() or path.stat().st_size != entry["size"]:
            try:
                _fetch_file(f"{step_url}/{file}", path, entry)
            except RemoteError as error:  # no fault of the step: an earlier one must not take its place
                raise ValueError(str(error)) from error
            count += entry["size"]
    if parts == 1 and not (target / MANIFEST).exists():
        with new_file(target / MANIFEST) as written:
            written.write(manifest)
    if count:
        logger.info("fetched %.1f MB of %s in %.1f s", count / 1e6, step_url, time.perf_counter() - begin)
    return target


def _fetch_file(url: str, path: Path, entry: Mapping[str, Any]) -> None:
    crc = 0
    with new_file(path) as target:
        for block in blocks(url, entry["size"], KEY):
            crc = zlib.crc32(block, crc)
            target.write(block)
        if f"{crc:08x}" != entry["crc32"]:
            step_url, _, name = url.rpartition("/")
            raise CheckpointError(f"{step_url} is broken: file {name} does not have its checksum")


def local_copy(step: Path | str) -> Path:
    """A step on the disk: itself, or the copy of what is behind a URL."""
    return fetch_step(step) if not isinstance(step, Path) else step
