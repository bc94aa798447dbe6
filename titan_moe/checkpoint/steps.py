"""The steps of a run, in a folder on the disk or behind a URL: what both have, by one name."""

from pathlib import Path
from typing import Any

from titan_moe.checkpoint import folder as disk
from titan_moe.checkpoint import remote
from titan_moe.checkpoint.folder import CheckpointError
from titan_moe.runtime.remote import is_url, joined

Place = Path | str  # a folder, or a URL


def place_of(dump_folder: Path, folder: str) -> Place:
    """Where a run has its checkpoints, by its dump folder and checkpoint.folder."""
    return folder if is_url(folder) else dump_folder / folder


def scan(folder: Place) -> tuple[dict[int, Any], dict[int, CheckpointError]]:
    """Steps whose files are there with the right sizes, by number, and of each other step what is wrong with it."""
    return disk.scan(folder) if isinstance(folder, Path) else remote.scan(folder)


def begin_step(folder: Place, step: int) -> Place:
    """Make room for a save of `step`, and return where it writes to; what saves that died have left is removed."""
    return disk.begin_step(folder, step) if isinstance(folder, Path) else remote.begin_step(folder, step)


def publish(staging: Place, final: Place, body: dict[str, Any]) -> None:
    """Make what was written to `staging` the step `final`, in place of another of that name."""
    if isinstance(staging, Path) and isinstance(final, Path):
        disk.publish(staging, final, body)
    else:
        remote.publish(str(final), body)


def prune(folder: Place, step: int, keep_latest_k: int) -> None:
    """Remove steps before `step` but for the latest `keep_latest_k - 1` complete ones."""
    if isinstance(folder, Path):
        disk.prune(folder, step, keep_latest_k)
    else:
        remote.prune(folder, step, keep_latest_k)


def steps_after(folder: Place, step: int) -> list[Any]:
    """Steps after `step`, whole or broken, oldest first."""
    return disk.steps_after(folder, step) if isinstance(folder, Path) else remote.steps_after(folder, step)


def set_aside(folder: Place, step: int, name: str) -> list[Any]:
    """Move steps after `step`, whole or broken, to `folder/name/step-N`; return where they are now."""
    return disk.set_aside(folder, step, name) if isinstance(folder, Path) else remote.set_aside(folder, step, name)


def size_of(step_folder: Place) -> int:
    """The bytes of a step's files."""
    if not isinstance(step_folder, Path):
        return sum(remote.files_of(step_folder).values())
    return sum(file.stat().st_size for file in step_folder.iterdir()) if step_folder.exists() else 0


def is_folder(path: Place) -> bool:
    """Whether there is a folder of this path or URL."""
    return path.is_dir() if isinstance(path, Path) else bool(remote.files_of(path))


def is_step(path: Place) -> bool:
    """Whether `path` is, or was meant to be, the folder of one step."""
    return disk.is_step_folder(path) if isinstance(path, Path) else remote.is_step_folder(path)


def parent_of(path: Place) -> Place:
    """The folder that `path` is in."""
    return path.parent if isinstance(path, Path) else path.rstrip("/").rpartition("/")[0]


def folder_of_steps(path: Place) -> Place:
    """The folder of steps in a dump folder; without one `path` is such a folder itself."""
    inner = joined(path, "checkpoint")
    return inner if is_folder(inner) else path
