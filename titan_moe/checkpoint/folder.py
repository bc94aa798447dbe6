"""Step folders on the disk: which are whole, and how one appears, is replaced, set aside and removed.

A step is whole when its files have the sizes in its manifest, and verified when they have the checksums, too.
"""

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
from titan_moe.runtime.remote import RemoteError
from titan_moe.runtime.world import rank, world_size

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)")
# .tmp: a save under way, or one that died; .old: a step that a newer save of it replaces; .trash: a step that is being
# removed. A number follows where an earlier one of that name could not be removed.
_LEFTOVER = re.compile(r"(step-\d+)\.(tmp|old|trash)(\.\d+)?")


class CheckpointError(OSError, ValueError):
    """A checkpoint that could not be written, or one that is broken; its text is one line for the user."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version of titan_moe has written."""


def is_step_folder(path: Path) -> bool:
    """Whether `path` is, or was meant to be, the folder of one step."""
    return (path / MANIFEST).exists() or STEP.fullmatch(path.name) is not None


def is_leftover(path: Path) -> bool:
    """Whether `path` is what a save or a removal that was cut short has left, and no step.

    A `.old` still is the step if nothing has the step's name: a crash came between the two renames of a replacement.
    """
    match = _LEFTOVER.fullmatch(path.name)
    return match is not None and (match[2] != "old" or os.path.lexists(path.with_name(match[1])))


def scan(folder: Path) -> tuple[dict[int, Path], dict[int, CheckpointError]]:
    """Steps in `folder` whose files are there with the right sizes, and of each other step what is wrong with it."""
    # Sizes alone are checked: a listing must not read every byte of every step. `verify` does that, for one step.
    complete, problems = {}, {}
    paths = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    for name, path in paths.items():
        # A `.old` counts only if a crash came between the two renames of a replacement, so that no other has its name.
        # A link counts even if it leads nowhere: the step lies on a disk that is not mounted, which is worth a warning.
        base = name.removesuffix(".old")
        is_step = path.is_dir() or path.is_symlink()
        if not (match := STEP.fullmatch(base)) or (base != name and base in paths) or not is_step:
            continue
        try:
            read_manifest(path)
        except CheckpointError as error:
            problems[int(match[1])] = error
        else:
            complete[int(match[1])] = path
    return complete, problems


def set_aside(folder: Path, step: int, name: str) -> list[Path]:
    """Move the steps in `folder` after `step`, whole or broken, to `folder/name/step-N`; return their new paths.

    There they no longer count as steps of the run, nothing removes them, and each can be loaded as before.
    """
    later = steps_after(folder, step)
    if not later:
        return []
    (folder / name).mkdir()

    # Oldest first, so that the newest step moves last: a run that is started again after a crash in between still finds
    # the step that it would have gone on from before.
    moved = []
    for path in later:
        # A `.old` whose replacement never came is the step itself, and gets its name.
        base = path.with_name(path.name.removesuffix(".old"))
        target = folder / name / (path.name if base in later else base.name)
        if path.is_symlink() and not os.path.isabs(link := os.readlink(path)):
            os.symlink(os.path.join("..", link), target)  # a relative link is read from the folder that it lies in
            path.unlink()
        else:
            os.rename(path, target)
        moved.append(target)

    # On the disk before the caller takes these steps' lines out of metrics.jsonl.
    fsync_folder(folder / name)
    fsync_folder(folder)
    return moved


def steps_after(folder: Path, step: int) -> list[Path]:
    """The folders of steps after `step` in `folder`, oldest first, and a `step-N.old` before its `step-N`."""
    later = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP.fullmatch(path.name.removesuffix(".old"))
        if match and int(match[1]) > step and (path.is_dir() or path.is_symlink()):
            later.append((int(match[1]), not path.name.endswith(".old"), path))
    return [path for *_, path in sorted(later)]


def read_manifest(step_folder: Path) -> dict[str, Any]:
    """The manifest of a step whose files all exist with the sizes that it says; else CheckpointError."""
    # Missing, unreadable and not what was written are told apart, because each is mended in another way: mount a disk,
    # give the right path, take an earlier step.
    broken = f"{step_folder} is broken"
    try:
        text = (step_folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        if step_folder.is_symlink() and not step_folder.exists():
            raise CheckpointError(f"{step_folder} links to {os.readlink(step_folder)}, which is not there") from None
        if not step_folder.is_dir():
            raise CheckpointError(f"checkpoint {step_folder} does not exist") from None
        raise CheckpointError(f"{broken}: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{broken}: {MANIFEST} cannot be read ({type(error).__name__})") from error
    body = parse_manifest(text, step_folder)
    for name, entry in body["files"].items():
        try:
            size = (step_folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{broken}: file {name} is missing") from None
        if size != entry["size"]:
            raise CheckpointError(f"{broken}: file {name} has {size} bytes, not {entry['size']}")
    return body


def parse_manifest(text: bytes, step_folder: Path | str) -> dict[str, Any]:
    """The manifest of a step by the content of its file; CheckpointError where it is not what was written."""
    broken = f"{step_folder} is broken"
    try:
        manifest = json.loads(text)
        body = manifest["body"]
        is_newer = body["format"] > FORMAT
        is_unchanged = manifest["crc32"] == crc32_of_json(body)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{broken}: {MANIFEST} cannot be read ({type(error).__name__})") from error

    # A newer format is told before the checksum is looked at: a later version may sum it up in another way.
    if is_newer:
        raise NewerFormatError(
            f"{step_folder} has checkpoint format {body['format']} and this titan_moe reads {FORMAT}: a newer one has "
            "saved it, and can load it"
        )
    if not is_unchanged:
        raise CheckpointError(f"{broken}: {MANIFEST} was changed after it was written")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{step_folder} has checkpoint format {body['format']}, this version reads {FORMAT}")

    # The manifest may be a stranger's, and must not lead out of its folder.
    for name in body["files"]:
        if not is_plain_name(name):
            raise CheckpointError(f"{broken}: {MANIFEST} names the file {name!r}, which is not in its folder")
    return body


def verify(step_folder: Path) -> dict[str, Any]:
    """The manifest of a step whose files all have their checksums, else CheckpointError; call it on every rank."""

    # Of R ranks each reads every R-th file, so that the bytes are read once and not R times.
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
    """Make the empty folder that a save of `step` writes into; what saves that died have left is removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    staging = _free(folder / f"step-{step}", "tmp")
    staging.mkdir()
    return staging


def publish(staging: Path, final: Path, body: dict[str, Any]) -> None:
    """Write the manifest into `staging` and give the folder its name, in place of a step that has it."""
    # On nodes with a disk each, every rank has written its files and no folder has them all.
    for name, entry in body["files"].items():
        if not (staging / name).exists() or (staging / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"rank 0 does not see {name}: the folder must be one that all nodes share")

    # The manifest comes last and everything is on the disk before the rename, so that no power cut leaves a folder
    # with the name of a step and without its files.
    write_synced(staging / MANIFEST, manifest_of(body))
    fsync_folder(staging)

    # A folder can't be renamed onto a full one, so the old step steps aside first. A crash between the two renames
    # leaves `step-N.old` alone: `scan` counts it, and `clean` gives it its name back. A file is not a save's: it stays.
    old = _free(final, "old")
    if final.is_file():
        aside = _free(final, "file")
        logger.warning("%s is a file, and a step is to have that name: the file is now %s", final, aside.name)
        os.rename(final, aside)
    elif os.path.lexists(final):
        os.rename(final, old)
    os.rename(staging, final)
    fsync_folder(final.parent)
    if os.path.lexists(old):
        remove(old)


def manifest_of(body: dict[str, Any]) -> bytes:
    """The content of a manifest's file."""
    return json.dumps({"crc32": crc32_of_json(body), "body": body}, indent=1).encode()


def clean(folder: Path) -> None:
    """Remove what saves that died have left in `folder`; a step that was being replaced gets its name back."""
    # Backwards, so that `step-N.old.1` comes before `step-N.old`: the higher number was replaced later, and is the one
    # to get the name if nothing has it.
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
    # Broken steps don't count among those that stay, and go with the old ones; steps after `step` are not this save's.
    complete, _ = scan(folder)
    older = sorted(old for old in complete if old < step)
    to_keep = older[len(older) - (keep_latest_k - 1) :] if keep_latest_k > 1 else []
    for path in list(folder.iterdir()):
        match = STEP.fullmatch(path.name)
        if match and int(match[1]) < step and int(match[1]) not in to_keep and _is_folder_or_link(path):
            warn_on_failure(partial(_discard, path, path.name))


def _is_folder_or_link(path: Path) -> bool:
    """Whether `path` may be a step; a plain file with the name of one is somebody else's."""
    return path.is_symlink() or path.is_dir()


def _free(step_folder: Path, kind: str) -> Path:
    """`step-N.KIND`, with a number if something has that name, which then could not be removed."""
    names = chain([f"{step_folder.name}.{kind}"], (f"{step_folder.name}.{kind}.{number}" for number in count(1)))
    return next(path for path in map(step_folder.with_name, names) if not os.path.lexists(path))


def _discard(path: Path, step_name: str) -> None:
    """Remove a step; it is renamed first, so that half a step never has the name of one."""
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
    # A failure is caught and raised below: a rank that left at once would let the others wait in the collective.
    result: Any = None
    failure: BaseException | None = None
    failed_rank = rank()
    if rank() == 0 or not main_only:
        try:
            result = task()
        except (Exception, CheckpointException) as error:  # torch's is not an Exception
            failed_rank, failure = _cause(error)

    # Its text travels, not the error itself: not every error can be pickled.
    outcome = (result, failed_rank, failure and reason(failure), isinstance(failure, OSError))
    outcomes: Any = [outcome] * world_size()
    if world_size() > 1:
        dist.all_gather_object(outcomes, outcome, group=group)

    # Failures of the disk alone are one line for the user. Where any rank has another error, it is raised as it is, not
    # hidden behind a disk that failed as well.
    failures = [(failed_rank, why, is_disk) for _, failed_rank, why, is_disk in outcomes if why is not None]
    if failures:
        failed_rank, why, _ = failures[0]
        text = f"{why} (on rank {failed_rank})" if world_size() > 1 else why
        if all(is_disk for *_, is_disk in failures):
            raise CheckpointError(text) from failure
        raise failure or RuntimeError(text)
    return [result for result, *_ in (outcomes[:1] if main_only else outcomes)]


def _cause(error: BaseException) -> tuple[int, BaseException]:
    """The rank that failed and its error: DCP raises on every rank, with the errors of the failed ones inside."""
    failed_rank = rank()
    while isinstance(error, CheckpointException) and error.failures:
        failed_rank, (error, _) = next(iter(error.failures.items()))
    return failed_rank, error


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, (CheckpointError, RemoteError)) else f"{type(error).__name__}: {text}"
