"""Lines of metrics.jsonl of later steps than the one that a run goes on from: moved to other files, never lost."""

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.files import appender, new_file

logger = logging.getLogger(__name__)


class Lines(NamedTuple):
    """Which lines of a metrics.jsonl are of steps up to a given one. The file may be long: it is parsed once."""

    kept: list[bool]  # of each line, in order: whether it is
    torn: set[int]  # numbers of the lines that are no records: what a power cut or a damaged disk leaves
    steps: set[int]  # of the kept lines of kind 'train'

    @property
    def num_later(self) -> int:
        """How many lines are of later steps."""
        return self.kept.count(False) - len(self.torn)


def cut(path: Path, step: int) -> None:
    """Move the lines of steps after `step`, and those that are torn, from a metrics.jsonl to the end of its .cut.jsonl.

    A torn line becomes the text of a record of kind 'torn'. Steps up to `step` that have no line are a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = sort_lines(path, step)

    # First they are written to the other file, then taken out of this one: a crash in between leaves a line in both
    # files, never in none.
    if not all(lines.kept):
        target = path.with_name(f"{path.stem}.cut{path.suffix}")
        with open(path, "rb") as file:
            later = [(index in lines.torn, line) for index, line in enumerate(file) if not lines.kept[index]]
        _append(target, [_as_record(line, step) if is_torn else line for is_torn, line in later])
        drop(path, lines)
        logger.info(
            "%s: the run goes on from step %d: %d lines of later steps and %d torn ones moved to the end of %s",
            *(path, step, lines.num_later, len(lines.torn), target),
        )

    # Every checkpoint is saved after the lines of its steps, so a gap is somebody's doing, or a damaged disk's.
    missing = [number for number in range(1, step + 1) if number not in lines.steps]
    if missing:
        logger.warning(
            "%s: no line of %d of the %d steps that the run goes on from: %s",
            *(path, len(missing), step, _ranges(missing)),
        )


def sort_lines(path: Path, step: int) -> Lines:
    """Find the lines of a metrics.jsonl that are of steps up to `step`; none where there is no file."""
    lines = Lines([], set(), set())
    if not path.exists():
        return lines
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            record = _parse(line)
            lines.kept.append(record is not None and record["step"] <= step)
            if record is None:
                lines.torn.add(index)
            elif lines.kept[-1] and record.get("kind") == "train":
                lines.steps.add(record["step"])
    return lines


def drop(path: Path, lines: Lines) -> None:
    """Leave the kept lines alone in a metrics.jsonl."""
    with open(path, "rb") as file, new_file(path) as shorter:
        shorter.writelines(itertools.compress(file, lines.kept))


def copy(path: Path, target: Path) -> None:
    """Copy a metrics.jsonl to `target`, as it is."""
    with open(path, "rb") as file, new_file(target) as same:
        same.writelines(file)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line, None where it is torn."""
    try:
        record = json.loads(line.decode())
        whole = line.endswith(b"\n") and isinstance(record["step"], int)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return record if whole else None


def _as_record(line: bytes, step: int) -> bytes:
    return json.dumps({"step": step, "kind": "torn", "text": line.decode(errors="replace")}).encode() + b"\n"


def _append(path: Path, lines: list[bytes]) -> None:
    """Append lines, below one that a power cut may have torn."""
    append, _, close = appender(path)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        is_torn = file.read() not in (b"", b"\n")
    try:
        append(b"".join([b"\n" if is_torn else b"", *lines]))
    finally:
        close()


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as 1 to 4, 6, 8 to 9; of many stretches the first three."""
    stretches = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in stretch] for _, stretch in stretches]
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
