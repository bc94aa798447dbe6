"""metrics.jsonl: a line for each record, read back, and cut where a run goes on from an earlier step.

Lines of later steps than the one that a run goes on from are moved to another file, never lost.
"""

import itertools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.runtime.files import appender, new_file
from titan_moe.sinks.sink import Record, Sink, scalars

logger = logging.getLogger(__name__)
TAIL = 1 << 21  # bytes at the end of metrics.jsonl that hold the last step and the last validation


def jsonl(path: Path, resume_step: int) -> Sink:
    """Append each record's numbers as one line of JSON; a number that is not finite becomes null.

    An array `NAME/experts` (L, E) becomes the numbers `NAME/layer_I/expert_J`.

    Lines of steps after `resume_step`, and torn ones, are first moved to a file beside it (`titan_moe.sinks.files`), so
    that after a crash the file holds each step once. A record that the disk refuses is kept and tried again with the
    next one.
    """
    cut(path, resume_step)
    append, sync, close = appender(path)

    def write(record: Record) -> None:
        values = {**scalars(record), **_of_experts(record)}
        numbers = {key: None if _is_odd(value) else value for key, value in values.items()}
        append((json.dumps(numbers, allow_nan=False) + "\n").encode())

    return Sink(write, close, str(path), sync)


def _of_experts(record: Record) -> dict[str, float]:
    """The numbers of each expert, from the arrays that the record carries of them."""
    arrays = {key.removesuffix("/experts"): value for key, value in record.items() if key.endswith("/experts")}
    return {
        f"{name}/layer_{layer}/expert_{expert}": value
        for name, array in arrays.items()
        for layer, values in enumerate(array.tolist())
        for expert, value in enumerate(values)
    }


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def parse_record(line: bytes | str) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None where it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
        return None
    return {key: math.nan if value is None else value for key, value in record.items()}


def last_records(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The last whole line of kind train and of kind validation, None where there is none in the last TAIL bytes."""
    # A study's table asks every second, and files are long: only the end is read. The line that it begins in is not
    # whole, and left out.
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")[1 if size > TAIL else 0 :]
    except FileNotFoundError:
        return None, None

    # From the end, as long as one of the two kinds is missing: the last line may be torn.
    last: dict[str, dict[str, Any]] = {}
    for line in reversed(lines):
        record = parse_record(line)
        if record is not None:
            last.setdefault(record["kind"], record)
        if len(last) == 2:
            break
    return last.get("train"), last.get("validation")


def has_record(path: Path, step: int, kind: str) -> bool:
    """Whether a jsonl file, whose lines are whole once it was opened as a sink, has a record of a step."""
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as file:
        return any(record["step"] == step and record["kind"] == kind for record in map(json.loads, file))


class Lines(NamedTuple):
    """Which lines of a metrics.jsonl are of steps up to a given one. The file may be long: it is parsed once."""

    is_kept: list[bool]  # of each line, in order: whether it is of such a step
    torn: set[int]  # numbers of the lines that are no records: what a power cut or a damaged disk leaves
    steps: set[int]  # of the kept lines of kind 'train'

    @property
    def num_later(self) -> int:
        """How many lines are of later steps."""
        return self.is_kept.count(False) - len(self.torn)


def cut(path: Path, step: int) -> None:
    """Move the lines of steps after `step`, and those that are torn, from a metrics.jsonl to the end of its .cut.jsonl.

    A torn line becomes the text of a record of kind 'torn'. Steps up to `step` that have no line are a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = sort_lines(path, step)

    # First they are written to the other file, then taken out of this one: a crash in between leaves a line in both
    # files, never in none.
    if not all(lines.is_kept):
        target = path.with_name(f"{path.stem}.cut{path.suffix}")
        with open(path, "rb") as file:
            later = [(index in lines.torn, line) for index, line in enumerate(file) if not lines.is_kept[index]]
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
    # Lines are known by their numbers: their text stays in the file, which may be larger than memory.
    lines = Lines([], set(), set())
    if not path.exists():
        return lines
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            record = _parse(line)
            lines.is_kept.append(record is not None and record["step"] <= step)
            if record is None:
                lines.torn.add(index)
            elif lines.is_kept[-1] and record.get("kind") == "train":
                lines.steps.add(record["step"])
    return lines


def drop(path: Path, lines: Lines) -> None:
    """Remove all but the kept lines from a metrics.jsonl, which is never half written."""
    with open(path, "rb") as file, new_file(path) as shorter:
        shorter.writelines(itertools.compress(file, lines.is_kept))


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
