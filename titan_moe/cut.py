"""Lines of metrics.jsonl that are of later steps than the one a run goes on from: moved to other files, never lost."""

import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.files import appender, write_pieces_atomic

logger = logging.getLogger(__name__)


class Count(NamedTuple):
    """What a metrics.jsonl has of lines that are not to stay, and of those that are."""

    later: int
    torn: int  # no records: what a power cut or a damaged disk leaves
    steps: set[int]  # of the lines that stay and are of kind 'train'


def cut(path: Path, step: int) -> None:
    """Move the lines of steps after `step`, and those that are torn, from a metrics.jsonl to the end of its .cut.jsonl.

    A torn line becomes the text of a record of kind 'torn'. Steps up to `step` that have no line are a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = count_lines(path, step)
    if count.later or count.torn:
        target = path.with_name(f"{path.stem}.cut{path.suffix}")
        _append(target, [line if record else _torn(line, step) for line, record in _lines(path) if _goes(record, step)])
        drop_later(path, step)  # last: a crash before leaves a line in both files, never in none
        logger.info(
            "%s: the run goes on from step %d: %d lines of later steps and %d torn ones moved to the end of %s",
            *(path, step, count.later, count.torn, target),
        )

    missing = [number for number in range(1, step + 1) if number not in count.steps]
    if missing:
        logger.warning(
            "%s: no line of %d of the %d steps that the run goes on from: %s",
            *(path, len(missing), step, _ranges(missing)),
        )


def count_lines(path: Path, step: int) -> Count:
    """What a metrics.jsonl has of lines up to `step` and after it; nothing where there is no file."""
    later, torn, steps = 0, 0, set()
    for _, record in _lines(path):
        if record is None:
            torn += 1
        elif record["step"] > step:
            later += 1
        elif record.get("kind") == "train":
            steps.add(record["step"])
    return Count(later, torn, steps)


def drop_later(path: Path, step: int) -> None:
    """Leave the lines of steps up to `step` alone in a metrics.jsonl."""
    write_pieces_atomic(path, (line for line, record in _lines(path) if not _goes(record, step)))


def copy(path: Path, target: Path) -> None:
    """Copy a metrics.jsonl to `target`, as it is."""
    with open(path, "rb") as file:
        write_pieces_atomic(target, file)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file with its record, None where it is torn."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line.decode())
                whole = line.endswith(b"\n") and isinstance(record["step"], int)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                whole, record = False, None
            yield line, record if whole else None


def _goes(record: dict[str, Any] | None, step: int) -> bool:
    return record is None or record["step"] > step


def _torn(line: bytes, step: int) -> bytes:
    return json.dumps({"step": step, "kind": "torn", "text": line.decode(errors="replace")}).encode() + b"\n"


def _append(path: Path, lines: list[bytes]) -> None:
    """Append lines, below one that a power cut may have torn."""
    append, _, close = appender(path)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = file.read() not in (b"", b"\n")
    try:
        append(b"".join([b"\n" if torn else b"", *lines]))
    finally:
        close()


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as 1 to 4, 6, 8 to 9; of many stretches the first three."""
    stretches = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in stretch] for _, stretch in stretches]
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
