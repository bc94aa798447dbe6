"""A run that goes back to an earlier step: what came after it is another branch, set aside and never removed.

Its steps go to checkpoint/aside-N/, and a copy of metrics.jsonl as it was is metrics.aside-N.jsonl.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from titan_moe.checkpoint.steps import Place, is_folder, set_aside, size_of, steps_after
from titan_moe.runtime.remote import joined
from titan_moe.sinks.files import copy, drop, sort_lines

logger = logging.getLogger(__name__)


def leave_branch(metrics: Path, folders: Sequence[Place], step: int, *, same_run: bool) -> None:
    """Set aside the steps after `step` in `folders` and a copy of `metrics`, then drop the lines after `step` from it.

    For one process, before training begins; `step` is the one that it goes on from. Without later steps nothing is
    done: the lines of a killed run are no branch. Where `metrics` are not of the `same_run` all their lines are set
    aside. Raises OSError as the file system does; what has not been set aside by then stays in its place.
    """
    if same_run and not any(steps_after(folder, step) for folder in folders):
        return
    lines = sort_lines(metrics, step if same_run else 0)
    name = _free_name(metrics, folders)

    # Lines are dropped last: a crash before that leaves them in both files, and the newest step says what the run is.
    if lines.num_later:
        target = _metrics_aside(metrics, name)
        copy(metrics, target)
        logger.info("%s: the run goes on from step %d: all lines so far are kept in %s", metrics, step, target)
    for folder in folders:
        moved = set_aside(folder, step, name)
        if moved:
            size = sum(size_of(path) for path in moved)
            logger.info(
                "the run goes on from step %d: %s moved to %s, which keeps %.1f MiB until you remove it",
                *(step, ", ".join(Path(path).name for path in moved), joined(folder, name), size / 2**20),
            )
    if lines.num_later:
        drop(metrics, lines)


def _free_name(metrics: Path, folders: Sequence[Place]) -> str:
    """The first aside-N that is not taken."""
    names = (f"aside-{number}" for number in itertools.count(1))
    return next(
        name
        for name in names
        if not os.path.lexists(_metrics_aside(metrics, name)) and not any(_is_taken(folder, name) for folder in folders)
    )


def _is_taken(folder: Place, name: str) -> bool:
    return os.path.lexists(folder / name) if isinstance(folder, Path) else is_folder(joined(folder, name))


def _metrics_aside(metrics: Path, name: str) -> Path:
    return metrics.with_name(f"{metrics.stem}.{name}{metrics.suffix}")
