"""The command line of scripts/verify_checkpoint.py."""

from pathlib import Path

from titan_moe.checkpoint.folder import CheckpointError, is_leftover, is_step_folder, verify
from titan_moe.runtime.command import Parser


def verify_checkpoint(args: list[str]) -> int:
    """Check every file of checkpoints by size and checksum: a line for each step, an error if any is broken."""
    # A broken step is no end: whoever asks wants to know which of all steps can still be used.
    parser = Parser("verify_checkpoint.py", "Check the files of checkpoints against their checksums.")
    parser.add_argument("checkpoint", type=Path, nargs="+", help="step folders, or dump folders (all their steps)")
    broken = 0
    for path in parser.parse_args(args).checkpoint:
        for step in _steps(path):
            try:
                body = verify(step)
            except CheckpointError as error:
                broken += 1
                print(error)
            else:
                size = sum(entry["size"] for entry in body["files"].values())
                print(f"{step}: {len(body['files'])} files, {size / 2**20:.1f} MiB, intact")
    if broken:
        raise ValueError(f"{broken} broken checkpoint{'s' if broken > 1 else ''}")
    return 0


def _steps(path: Path) -> list[Path]:
    """The step folders that `path` means, oldest first: itself, or all in a dump or checkpoint folder."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if is_step_folder(path):
        return [path]
    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    steps = [step for step in folder.iterdir() if step.is_dir() and is_step_folder(step) and not is_leftover(step)]
    if not steps:
        raise ValueError(f"{path}: no step-N folder in {folder}")
    return sorted(steps, key=lambda step: (len(step.name), step.name))
