"""Folders that a conversion makes: they appear whole, or not at all."""

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from titan_moe.checkpoint.lazy import LazyTensors
from titan_moe.checkpoint.store import save_lazily
from titan_moe.runtime.files import fsync_folder, remove_leftovers, temporary_path


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` at the end of the block, and is removed when that raises.

    A SIGTERM during the block raises KeyboardInterrupt there, as Ctrl-C does. Raises ValueError where `out` is there
    already.
    """
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already: give the name of a new folder")

    # Beside `out`, because a rename is atomic only within one file system.
    staging = temporary_path(out.absolute())
    remove_leftovers(staging.parent)
    with _interruptible():
        try:
            staging.mkdir(parents=True)
            yield staging
            if staging.exists():  # the block may have given its content a name of its own
                fsync_folder(staging)
                os.rename(staging, out)
            fsync_folder(out.absolute().parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at a SIGTERM, if this is the main thread.

    Unhandled, the signal would end the process without running any `finally`, and what is half done would stay.
    """

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # Python lets no other thread set what a signal does.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def new_checkpoint(
    out: Path,
    step: int,
    tensors: LazyTensors,
    *,
    optimizer: str | None = None,
    values: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    files: Mapping[str, str],
) -> Iterator[Path]:
    """A step folder with these tensors, to be checked in the block, that then becomes `out` or part of it.

    If `out` is named `step-N` it is the step folder itself, of step N instead of `step`. Else it is a dump folder, and
    the step is in its `checkpoint/`. A block that raises leaves neither.
    """
    named = re.fullmatch(r"step-(\d+)", out.name)
    step = int(named[1]) if named else step
    with new_folder(out) as staging:
        step_folder = save_lazily(
            staging / "checkpoint",
            step,
            tensors,
            optimizer=optimizer,
            values=values or {},
            extra=extra or {},
            files=files,
        )
        yield step_folder

        # A step folder is all that was asked for, so it leaves the dump folder around it.
        if named:
            os.rename(step_folder, out)
            shutil.rmtree(staging)
