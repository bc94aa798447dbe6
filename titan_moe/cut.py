"""Lines of metrics.jsonl that are of later steps than the one a run goes on from: moved to other files, never lost."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.files import appender, fsync_folder, write_atomic

logger = logging.getLogger(__name__)


class Lines(NamedTuple):
    """The lines of a metrics.jsonl as they are in the file, in its order, by what they are to a step."""

    kept: list[bytes]  # up to it
    later: list[bytes]
    torn: list[bytes]  # no records: what a power cut or a damaged disk leaves
    steps: set[int]  # of the kept lines of kind 'train'


def cut(path: Path, step: int) -> None:
    """Move the lines of steps after `step`, and those that are torn, from a metrics.jsonl to the end of its .cut.jsonl.

    A torn line becomes the text of a record of kind 'torn'. Steps up to `step` that have no line are a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_lines(path, step)
    if lines.later or lines.torn:
        torn = [{"step": step, "kind": "torn", "text": line.decode(errors="replace")} for line in lines.torn]
        target = path.with_name(f"{path.stem}.cut{path.suffix}")
        _append(target, [*lines.later, *(json.dumps(record).encode() + b"\n" for record in torn)])
        write_kept(path, lines)  # last: a crash before leaves a line in both files, never in none
        logger.info(
            "%s: the run goes on from step %d: %d lines of later steps and %d torn ones moved to the end of %s",
            *(path, step, len(lines.later), len(torn), target),
        )

    missing = [number for number in range(1, step + 1) if number not in lines.steps]
    if missing:
        logger.warning(
            "%s: no line of %d of the %d steps that the run goes on from: %s",
            *(path, len(missing), step, _ranges(missing)),
        )


def read_lines(path: Path, step: int) -> Lines:
    """The lines of a metrics.jsonl by whether they are of steps up to `step`; none where there is no file."""
    lines = Lines([], [], [], set())
    if not path.exists():
        return lines
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is None:
                lines.torn.append(line)
            elif record["step"] > step:
                lines.later.append(line)
            else:
                lines.kept.append(line)
                if record.get("kind") == "train":
                    lines.steps.add(record["step"])
    return lines


def write_kept(path: Path, lines: Lines) -> None:
    """Leave the kept lines alone in a metrics.jsonl."""
    write_atomic(path, b"".join(lines.kept).decode())


def copy(path: Path, target: Path) -> None:
    """Copy a file to `target`, which has its name once it is whole and on the disk."""
    draft = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(path, draft)
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, target)
    fsync_folder(target.parent)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line, None where it is torn."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record and line.endswith(b"\n") else None


def _append(path: Path, lines: list[bytes]) -> None:
    """Append lines, below one that a power cut may have torn."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    append, _, close = appender(path)
    try:
        append(b"".join([b"" if whole else b"\n", *lines]))
    finally:
        close()


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as 1 to 4, 6, 8 to 9; of many stretches the first three."""
    stretches = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in stretch] for _, stretch in stretches]
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
