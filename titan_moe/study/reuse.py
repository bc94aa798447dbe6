"""Train points that several studies share once: copy a finished run from one study's folder to another's."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from titan_moe.config import read_saved, to_toml
from titan_moe.runtime.files import remove_leftovers, temporary_path
from titan_moe.study.grid import Run, without_job
from titan_moe.study.runs import LOCK, POINT, prepare, status


def reuse(runs: Sequence[Run], folders: Sequence[str]) -> int:
    """For each new run copy a finished one of the same configuration from `folders`; the number of copies.

    Checkpoints are not copied. A folder without runs of a study is a ValueError.
    """
    sources = finished_in(folders)
    taken = 0
    for run in runs:
        source = sources.get(to_toml(without_job(run.config)))
        if source is not None and status(run.folder, run.config.training.steps).state == "new":
            copy_run(source, run)
            taken += 1
    return taken


def finished_in(folders: Sequence[str]) -> dict[str, Path]:
    """Folders of the finished runs in the folders of studies, by configuration as TOML."""
    # A run is known by its whole configuration: two studies may name the same point differently.
    folders_by_config: dict[str, Path] = {}
    for folder in folders:
        points = sorted(Path(folder).glob(f"runs/*/*/{POINT}"))
        if not points:
            raise ValueError(f"--reuse {folder}: holds no runs of a study: give the dump folder of one")
        for point in points:
            try:
                config = read_saved(point)
            except ValueError:  # it has a key that no longer exists, so no run of today is like it
                continue
            if status(point.parent, config.training.steps).state == "finished":
                folders_by_config.setdefault(to_toml(without_job(config)), point.parent)
    return folders_by_config


def copy_run(source: Path, run: Run) -> None:
    """Copy a finished run into the folder of `run`, which appears whole or not at all."""
    # Half a copy would look like a run of its own, interrupted or finished: the folder gets its name at the end.
    draft = temporary_path(run.folder)
    remove_leftovers(draft.parent)
    shutil.copytree(source, draft, symlinks=True, ignore=shutil.ignore_patterns(run.config.checkpoint.folder, LOCK))
    shutil.rmtree(run.folder, ignore_errors=True)
    os.replace(draft, run.folder)
    prepare(run)
