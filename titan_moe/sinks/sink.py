"""Where numbers go: the sinks, each a place for records.

A record is one flat dictionary of a step: `step`, `kind` ('train' or 'validation') and numbers; it may carry `load`, an
(L, E) array of tokens per expert. Only the main rank has sinks. Slow packages are imported where they are used.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
Record = Mapping[str, Any]
_PER_LAYER = re.compile(r".*/layer_\d+")


class Sink(NamedTuple):
    """A place for records. If `write` raises OSError, that record is late or lost, and the next one may succeed.

    `sync` waits until all that was written is on the disk, safe from a power cut.
    """

    write: Callable[[Record], None]
    close: Callable[[], None]
    name: str
    sync: Callable[[], None] = lambda: None


def fan_out(*sinks: Sink) -> Sink:
    """One sink that writes to all `sinks`.

    A sink whose disk is full or whose pipe is closed stops neither the others nor training: an error is logged.
    """
    failing: set[str] = set()
    gone: set[str] = set()  # a closed pipe stays closed

    def attempt(sink: Sink, task: Callable[[], None]) -> None:
        if sink.name in gone:
            return

        # Each change is logged once, not each record: a disk may stay full for thousands of steps.
        try:
            task()
        except OSError as error:
            if sink.name not in failing:
                logger.error("CANNOT WRITE TO %s (%s): training goes on without it", sink.name, error)
            failing.add(sink.name)
            if isinstance(error, BrokenPipeError):
                gone.add(sink.name)
        else:
            if sink.name in failing:
                logger.warning("%s can be written again", sink.name)
            failing.discard(sink.name)

    def write(record: Record) -> None:
        for sink in sinks:
            attempt(sink, lambda sink=sink: sink.write(record))

    def close() -> None:
        for sink in sinks:
            attempt(sink, sink.close)

    def sync() -> None:
        for sink in sinks:
            try:  # no `attempt`: a full disk refuses writes and syncs what it has
                sink.sync()
            except OSError as error:
                logger.error("CANNOT SYNC %s (%s): a power cut may take its last lines", sink.name, error)

    return Sink(write, close, ", ".join(sink.name for sink in sinks), sync)


def last_validation() -> tuple[Sink, Callable[[], Record | None]]:
    """A sink that keeps the last validation it was given, and a function that returns it (None before the first)."""
    last: list[Record] = []

    def write(record: Record) -> None:
        if record["kind"] == "validation":
            last[:] = [record]

    return Sink(write, lambda: None, "the summary"), lambda: last[0] if last else None


def under_set(name: str, numbers: Record) -> dict[str, Any]:
    """The numbers of a validation set or task by their names in the record of a validation, `validation/NAME/KEY`."""
    return {f"validation/{name}/{key}": value for key, value in numbers.items()}


def of_sets(record: Record) -> dict[str, dict[str, Any]]:
    """What `under_set` has put into a record: the numbers of each validation set and task, by its name."""
    sets: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        if key.startswith("validation/"):
            _, name, number = key.split("/", 2)
            sets.setdefault(name, {})[number] = value
    return sets


def scalars(record: Record) -> dict[str, Any]:
    """The record's numbers and strings: arrays are left out, zero-dimensional ones become numbers."""
    plain = {key: value.item() if getattr(value, "ndim", None) == 0 else value for key, value in record.items()}
    return {key: value for key, value in plain.items() if isinstance(value, (str, int, float))}


def tagged(record: Record) -> dict[str, float]:
    """The record's numbers by their names in TensorBoard and wandb: `KIND/KEY`, of one layer `KIND_per_layer/KEY`.

    Those of a validation set are `validation/NAME/KEY` as they are.
    """
    kind = record["kind"]
    numbers = {key.removeprefix(f"{kind}/"): v for key, v in scalars(record).items() if key not in {"step", "kind"}}
    return {
        f"{kind}{'_per_layer' if _PER_LAYER.fullmatch(key) else ''}/{key}": value
        for key, value in numbers.items()
        if not isinstance(value, str)
    }
