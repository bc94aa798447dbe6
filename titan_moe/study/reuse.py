"""Points that several studies share are trained once: a finished run is copied from one study's folder to another's."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from titan_moe.config import read_saved, to_toml
from titan_moe.runtime.files import remove_leftovers, temporary_path
from titan_moe.study.grid import Run, without_job
from titan_moe.study.runs import LOCK, POINT, prepare, status


def reuse(runs: Sequence[Run], folders: Sequence[str]) -> int:
    """Copy, for each new run, a finished one of the same configuration from `folders`; how many were found.

    Checkpoints stay where they are. A folder without runs of a study is a ValueError.
    """
    found = finished_in(folders)
    taken = 0
    for run in runs:
        source = found.get(to_toml(without_job(run.config)))
        if source is not None and status(run.folder, run.config.training.steps).state == "new":
            copy_run(source, run)
            taken += 1
    return taken


def finished_in(folders: Sequence[str]) -> dict[str, Path]:
    """The finished runs in the folders of studies, by their configurations."""
    found: dict[str, Path] = {}
    for folder in folders:
        points = sorted(Path(folder).glob(f"runs/*/*/{POINT}"))
        if not points:
            raise ValueError(f"--reuse {folder}: holds no runs of a study: give the dump folder of one")
        for point in points:
            try:
                config = read_saved(point)
            except ValueError:  # a key of it has gone since: it is like no run of today
                continue
            if status(point.parent, config.training.steps).state == "finished":
                found.setdefault(to_toml(without_job(config)), point.parent)
    return found


def copy_run(source: Path, run: Run) -> None:
    """Copy a finished run into the folder of `run`, which appears whole or not at all."""
    draft = temporary_path(run.folder)
    remove_leftovers(draft.parent)
    shutil.copytree(source, draft, symlinks=True, ignore=shutil.ignore_patterns(run.config.checkpoint.folder, LOCK))
    shutil.rmtree(run.folder, ignore_errors=True)
    os.replace(draft, run.folder)
    prepare(run)
