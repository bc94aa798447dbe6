"""Folders that a conversion makes: whole under their name, or not there at all."""

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
    staging = temporary_path(out.absolute())
    remove_leftovers(staging.parent)
    with _interruptible():
        try:
            staging.mkdir(parents=True)
            yield staging
            if staging.exists():  # else what it held is there by another name already
                fsync_folder(staging)
                os.rename(staging, out)
            fsync_folder(out.absolute().parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at a SIGTERM, in the main thread: others may not set what a signal does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

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
    """A step folder with these tensors, to be checked in the block; after it, it is `out` or in the dump folder `out`.

    `out` is a step folder if its name says so (`step-N`), and then of step N.
    """
    named = re.fullmatch(r"step-(\d+)", out.name)
    step = int(named[1]) if named else step
    with new_folder(out) as staging:
        made = save_lazily(
            staging / "checkpoint",
            step,
            tensors,
            optimizer=optimizer,
            values=values or {},
            extra=extra or {},
            files=files,
        )
        yield made
        if named:
            os.rename(made, out)
            shutil.rmtree(staging)
