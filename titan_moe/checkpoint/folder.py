"""Step folders on the disk: their manifest, which are whole, how one appears, is replaced and goes."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from titan_moe.runtime.files import (
    crc32_of,
    crc32_of_json,
    fsync_folder,
    is_plain_name,
    remove,
    warn_once,
    write_synced,
)
from titan_moe.runtime.world import rank, world_size

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
# .tmp: a save that died; .old: a step that a newer save of it replaces; .trash: a step that is being removed; a number
# follows where an earlier one of that name is still there
_LEFTOVER = re.compile(r"(step-\d+)\.(tmp|old|trash)(\.\d+)?")


class CheckpointError(OSError, ValueError):
    """A checkpoint that could not be written, or one that is broken; its text is one line for the user."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version of titan_moe has written."""


def is_step_folder(path: Path) -> bool:
    """Whether `path` is, or was meant to be, the folder of one step."""
    return (path / MANIFEST).exists() or _STEP.fullmatch(path.name) is not None


def is_leftover(path: Path) -> bool:
    """Whether `path` is what a save or a removal that was cut short has left, and no step.

    A `.old` is one where a crash came between the two renames of a replacement, so that no other has its name.
    """
    match = _LEFTOVER.fullmatch(path.name)
    return match is not None and (match[2] != "old" or os.path.lexists(path.with_name(match[1])))


def scan(folder: Path) -> tuple[dict[int, Path], dict[int, CheckpointError]]:
    """Steps in `folder` whose files are there with the right sizes, and of each other step what is wrong with it."""
    complete, problems = {}, {}
    paths = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    for name, path in paths.items():
        base = name.removesuffix(".old")  # counts if a crash came between the two renames of a replacement
        is_step = path.is_dir() or path.is_symlink()  # also a link to what is not there, as a disk that is not mounted
        if not (match := _STEP.fullmatch(base)) or (base != name and base in paths) or not is_step:
            continue
        try:
            read_manifest(path)
        except CheckpointError as error:
            problems[int(match[1])] = error
        else:
            complete[int(match[1])] = path
    return complete, problems


def set_aside(folder: Path, step: int, name: str) -> list[Path]:
    """Move the steps in `folder` after `step`, whole or broken, to `folder/name/step-N`; give their new places.

    There nothing counts them as the run's or removes them, and each is a step folder as before. They go oldest first:
    until the last has gone the newest step is what it was, so that a crash leaves the run as it was or as it shall be.
    """
    later = steps_after(folder, step)
    if not later:
        return []
    (folder / name).mkdir()
    moved = []
    for path in later:
        base = path.with_name(path.name.removesuffix(".old"))
        target = folder / name / (path.name if base in later else base.name)
        if path.is_symlink() and not os.path.isabs(link := os.readlink(path)):
            os.symlink(os.path.join("..", link), target)  # it is relative to where it lies
            path.unlink()
        else:
            os.rename(path, target)
        moved.append(target)
    fsync_folder(folder / name)
    fsync_folder(folder)
    return moved


def steps_after(folder: Path, step: int) -> list[Path]:
    """The folders of steps after `step` in `folder`, oldest first, and of one step the one being replaced first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name.removesuffix(".old"))
        if match and int(match[1]) > step and (path.is_dir() or path.is_symlink()):
            found.append((int(match[1]), not path.name.endswith(".old"), path))
    return [path for *_, path in sorted(found)]


def read_manifest(step_folder: Path) -> dict[str, Any]:
    """The manifest, if all its files exist with the sizes it says; else CheckpointError."""
    broken = f"{step_folder} is broken"
    try:
        manifest = json.loads((step_folder / MANIFEST).read_text(encoding="utf-8"))
        body = manifest["body"]
        newer = body["format"] > FORMAT  # asked first: it may have another checksum
        whole = manifest["crc32"] == crc32_of_json(body)
    except FileNotFoundError:
        if step_folder.is_symlink() and not step_folder.exists():
            raise CheckpointError(f"{step_folder} links to {os.readlink(step_folder)}, which is not there") from None
        if not step_folder.is_dir():
            raise CheckpointError(f"checkpoint {step_folder} does not exist") from None
        raise CheckpointError(f"{broken}: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{broken}: {MANIFEST} cannot be read ({type(error).__name__})") from error
    if newer:
        raise NewerFormatError(
            f"{step_folder} has checkpoint format {body['format']} and this titan_moe reads {FORMAT}: a newer one has "
            "saved it, and can load it"
        )
    if not whole:
        raise CheckpointError(f"{broken}: {MANIFEST} was changed after it was written")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{step_folder} has checkpoint format {body['format']}, this version reads {FORMAT}")
    for name, entry in body["files"].items():
        if not is_plain_name(name):
            raise CheckpointError(f"{broken}: {MANIFEST} names the file {name!r}, which is not in its folder")
        try:
            size = (step_folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{broken}: file {name} is missing") from None
        if size != entry["size"]:
            raise CheckpointError(f"{broken}: file {name} has {size} bytes, not {entry['size']}")
    return body


def verify(step_folder: Path) -> dict[str, Any]:
    """The manifest of a step whose files all have their checksums, else CheckpointError; ranks share the reading."""

    def check() -> dict[str, Any]:
        body = read_manifest(step_folder)
        for name in sorted(body["files"])[rank() :: world_size()]:
            if crc32_of(step_folder / name) != body["files"][name]["crc32"]:
                raise CheckpointError(f"{step_folder} is broken: file {name} does not have its checksum")
        return body

    return run_on_all_ranks(check)[rank()]


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of files in `folder`, as a manifest lists them."""
    return {name: {"size": (folder / name).stat().st_size, "crc32": crc32_of(folder / name)} for name in names}


def begin_step(folder: Path, step: int) -> Path:
    """Make the empty folder that a save of `step` writes into, after removing what dead saves left."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    staging = _free(folder / f"step-{step}", "tmp")
    staging.mkdir()
    return staging


def publish(staging: Path, final: Path, body: dict[str, Any]) -> None:
    """Seal `staging` with its manifest and give it its name, in place of a step that has it."""
    for name, entry in body["files"].items():
        if not (staging / name).exists() or (staging / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"rank 0 does not see {name}: the folder must be one that all nodes share")
    sealed = {"crc32": crc32_of_json(body), "body": body}
    write_synced(staging / MANIFEST, json.dumps(sealed, indent=1).encode())
    fsync_folder(staging)
    old = _free(final, "old")
    if final.is_file():  # not ours
        aside = _free(final, "file")
        logger.warning("%s is a file, and a step is to have that name: the file is now %s", final, aside.name)
        os.rename(final, aside)
    elif os.path.lexists(final):
        os.rename(final, old)
    os.rename(staging, final)
    fsync_folder(final.parent)
    if os.path.lexists(old):
        remove(old)


def clean(folder: Path) -> None:
    """Remove what saves that died have left in `folder`; a step that was being replaced gets its name back."""
    for path in sorted(folder.iterdir(), reverse=True):
        if (match := _LEFTOVER.fullmatch(path.name)) and _is_folder_or_link(path):
            if not is_leftover(path):
                warn_on_failure(partial(os.rename, path, path.with_name(match[1])))
            elif match[2] == "trash":
                remove(path)
            else:
                warn_on_failure(partial(_discard, path, match[1]))


def prune(folder: Path, step: int, keep_latest_k: int) -> None:
    """Remove steps before `step` but for the latest `keep_latest_k - 1` complete ones."""
    complete, _ = scan(folder)
    older = sorted(old for old in complete if old < step)
    keep = older[len(older) - (keep_latest_k - 1) :] if keep_latest_k > 1 else []
    for path in list(folder.iterdir()):
        match = _STEP.fullmatch(path.name)
        if match and int(match[1]) < step and int(match[1]) not in keep and _is_folder_or_link(path):
            warn_on_failure(partial(_discard, path, path.name))


def _is_folder_or_link(path: Path) -> bool:
    """Whether `path` may be a step; a plain file may have the name of one, but is somebody else's."""
    return path.is_symlink() or path.is_dir()


def _free(step_folder: Path, kind: str) -> Path:
    """`step-N.KIND`, with a number where that can't be had: what has the name could not be removed."""
    names = chain([f"{step_folder.name}.{kind}"], (f"{step_folder.name}.{kind}.{number}" for number in count(1)))
    return next(path for path in map(step_folder.with_name, names) if not os.path.lexists(path))


def _discard(path: Path, step_name: str) -> None:
    """Remove a folder or a link to one; renamed first, so that it is never half a step under its name."""
    trash = _free(path.with_name(step_name), "trash")
    os.rename(path, trash)
    remove(trash)


def warn_on_failure(task: Callable[[], object]) -> None:
    """Run housekeeping whose failure must not stop training: it warns, once for each reason."""
    try:
        task()
    except OSError as error:
        warn_once(f"cannot remove old checkpoint files: {reason(error)}")


def run_on_all_ranks(
    task: Callable[[], T], *, main_only: bool = False, group: dist.ProcessGroup | None = None
) -> list[T]:
    """Run `task` on every rank and return all ranks' results; with `main_only` on rank 0, and its result alone.

    `group` is of all ranks, for threads whose messages must not mix with those of the training; None: the default one.
    What fails on one rank raises on all: CheckpointError for failures of the file system, else the error itself.
    """
    result: Any = None
    failure: BaseException | None = None
    where = rank()
    if rank() == 0 or not main_only:
        try:
            result = task()
        except (Exception, CheckpointException) as error:  # told to the other ranks, and raised again below
            where, failure = _cause(error)
    mine = (result, where, failure and reason(failure), isinstance(failure, OSError))
    outcomes: Any = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(outcomes, mine, group=group)
    failed = [(where, why, expected) for _, where, why, expected in outcomes if why is not None]
    if failed:
        where, why, _ = failed[0]
        text = f"{why} (on rank {where})" if world_size() > 1 else why
        if all(expected for *_, expected in failed):
            raise CheckpointError(text) from failure
        raise failure or RuntimeError(text)
    return [result for result, *_ in (outcomes[:1] if main_only else outcomes)]


def _cause(error: BaseException) -> tuple[int, BaseException]:
    """What really failed and on which rank: DCP tells every rank of it, wrapped."""
    where = rank()
    while isinstance(error, CheckpointException) and error.failures:
        where, (error, _) = next(iter(error.failures.items()))
    return where, error


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
