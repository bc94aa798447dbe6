"""The command line of scripts/verify_checkpoint.py."""

from collections.abc import Sequence
from pathlib import Path

from titan_moe.checkpoint.folder import CheckpointError, is_leftover, is_step_folder, verify
from titan_moe.checkpoint.remote import local_copy
from titan_moe.checkpoint.steps import folder_of_steps, is_folder, is_step, steps_after
from titan_moe.runtime.command import Parser
from titan_moe.runtime.remote import local_or_url


def verify_checkpoint(args: list[str]) -> int:
    """Check every file of checkpoints by size and checksum: a line for each step, an error if any is broken."""
    # A broken step is no end: whoever asks wants to know which of all steps can still be used.
    parser = Parser("verify_checkpoint.py", "Check the files of checkpoints against their checksums.")
    parser.add_argument(
        "checkpoint", type=local_or_url, nargs="+", help="step folders, dump folders (all their steps), or URLs"
    )
    broken = 0
    for path in parser.parse_args(args).checkpoint:
        for step in _steps(path):
            try:
                body = verify(local_copy(step))
            except CheckpointError as error:
                broken += 1
                print(error)
            else:
                size = sum(entry["size"] for entry in body["files"].values())
                print(f"{step}: {len(body['files'])} files, {size / 2**20:.1f} MiB, intact")
    if broken:
        raise ValueError(f"{broken} broken checkpoint{'s' if broken > 1 else ''}")
    return 0


def _steps(path: Path | str) -> Sequence[Path | str]:
    """The step folders that `path` means, oldest first: itself, or all in a dump or checkpoint folder."""
    if not is_folder(path):
        raise ValueError(f"{path}: no such folder")
    if not isinstance(path, Path):
        steps = [path] if is_step(path) else steps_after(folder_of_steps(path), -1)
        if not steps:
            raise ValueError(f"{path}: no step-N folder in it")
        return steps
    if is_step_folder(path):
        return [path]
    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    steps = [step for step in folder.iterdir() if step.is_dir() and is_step_folder(step) and not is_leftover(step)]
    if not steps:
        raise ValueError(f"{path}: no step-N folder in {folder}")
    return sorted(steps, key=lambda step: (len(step.name), step.name))
