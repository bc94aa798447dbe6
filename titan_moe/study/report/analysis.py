"""From runs to a table: means and 95 % intervals over seeds, differences paired by seed, what is best or level."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from titan_moe.study.grid import Point, Run, point_text, value_text
from titan_moe.study.report.likeness import lengths, unlike
from titan_moe.study.report.measures import MEASURES
from titan_moe.study.runs import (
    METRICS,
    History,
    Record,
    Status,
    history,
    measure,
    reached,
    result,
    status,
    until,
    validated_at,
)

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over `count` seeds and half the width of its 95 % t-interval, NaN for fewer than two."""

    mean: float
    half: float
    count: int


class Entry(NamedTuple):
    """A run with what is known of it."""

    run: Run
    status: Status
    result: Record
    history: History


class AxisInfo(NamedTuple):
    """An axis as a report shows it: values in the order of the study."""

    id: str
    label: str
    values: tuple[Any, ...]

    @property
    def is_numeric(self) -> bool:
        """Whether values lie on a scale."""
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)


class Summary(NamedTuple):
    """One point: its runs, and the measures of those that count."""

    point: Point
    name: str
    entries: tuple[Entry, ...]
    counted: tuple[Entry, ...]  # the finished ones, or all where none is
    measures: Mapping[str, Interval]  # those that all that count have as a finite number
    nonfinite: Mapping[str, int]  # of the others: runs where it is NaN or infinite
    is_ranked: bool  # whether its numbers may be compared: of finished runs, or of the same length

    @property
    def left_out(self) -> int:
        """Runs that do not count, as others of the point have finished."""
        return len(self.entries) - len(self.counted)


class Standing(NamedTuple):
    """Which point has the best mean of a measure, and what paired intervals say of the others."""

    lead: Summary
    level: tuple[Summary, ...]  # the interval of their difference to it contains 0
    behind: tuple[Summary, ...]  # it does not
    untold: tuple[Summary, ...]  # there is none: fewer than two seeds in common
    level_at_once: int  # of those behind: level by intervals that hold for all comparisons at once

    @property
    def compared(self) -> int:
        """How many differences were looked at."""
        return len(self.level) + len(self.behind) + len(self.untold)

    @property
    def is_clear(self) -> bool:
        """Whether the best is better than every other."""
        return not self.level and not self.untold

    @property
    def marked(self) -> tuple[Summary, ...]:
        """What a table or figure marks: the one that is best, or those that are level; nothing where none can tell."""
        return (self.lead, *self.level) if self.level or self.is_clear else ()


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and half width of Student's t-interval: t((1 + level) / 2, n - 1) * s / sqrt(n)."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes seconds to import

    count = len(values)
    half = math.nan
    if count > 1:
        half = float(stdtrit(count - 1, (1 + level) / 2)) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values), half, count)


def paired_difference(one: Summary, other: Summary, measure: str, level: float = LEVEL) -> Interval | None:
    """Interval of one - other over the seeds that both have, None where there is none in common.

    Runs with the same seed share their initial weights and the order of their data, so that their difference has less
    noise than the two means.
    """
    values = list(seed_differences(one, other, measure).values())
    return interval(values, level) if values else None


def seed_differences(one: Summary, other: Summary, measure: str) -> dict[int, float]:
    """one - other for each seed that both have."""
    first, second = by_seed(one, measure), by_seed(other, measure)
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def contains_zero(found: Interval) -> bool:
    """Whether an interval leaves open which of the two is the larger; one of a single seed does."""
    return not abs(found.mean) > found.half


def by_seed(summary: Summary, measure: str) -> dict[int, float]:
    """A measure of a point's runs by their seed."""
    return {
        entry.run.seed: entry.result[measure]
        for entry in summary.counted
        if math.isfinite(entry.result.get(measure, math.nan))
    }


def read_entries(runs: Sequence[Run]) -> list[Entry]:
    """Read what the runs have left so far."""
    entries = []
    for run in runs:
        one = status(run.folder, run.config.training.steps)
        entries.append(Entry(run, one, result(run, one.state), history(run.folder / METRICS)))
    return entries


def summarize(entries: Sequence[Entry]) -> list[Summary]:
    """One summary for each point, in the order of the runs; points that measured nothing have no measures."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(repr(sorted(entry.run.point.items())), []).append(entry)
    summaries = []
    for group in groups.values():
        finished = [entry for entry in group if entry.status.state == "finished"]
        counted = finished or [entry for entry in group if entry.status.train is not None]
        summaries.append(summary_of(group, counted, is_ranked=bool(finished)))
    return summaries


def summary_of(group: Sequence[Entry], counted: Sequence[Entry], *, is_ranked: bool) -> Summary:
    """The summary of a point's runs, of which some count."""
    measures, nonfinite = {}, {}
    for key in MEASURES:
        values = [entry.result[key] for entry in counted if key in entry.result]
        if bad := sum(not math.isfinite(value) for value in values):
            nonfinite[key] = bad
        elif values:
            measures[key] = interval(values)
    point = group[0].run.point
    return Summary(point, point_text(point), tuple(group), tuple(counted), measures, nonfinite, is_ranked)


def standing(summaries: Sequence[Summary], measure: str) -> Standing | None:
    """Who leads in a measure among the points that may be compared; None where nothing is better than another.

    The best mean is found after the fact, so it alone says little: a point is behind it only where the paired interval
    of the two does not contain 0. Of measures that the runs do not share (`likeness.unlike`) there is no best.
    """
    found = [summary for summary in summaries if summary.is_ranked and measure in summary.measures]
    shown = MEASURES[measure]
    if len(found) < 2 or not shown.better or unlike(counted_results(found), measure):
        return None
    lead = (min if shown.better == "lower" else max)(found, key=lambda summary: summary.measures[measure].mean)
    others = [summary for summary in found if summary is not lead]
    said = [relation(other, lead, measure) for other in others]
    level, behind, untold = (
        tuple(other for other, one in zip(others, said, strict=True) if one == word)
        for word in ("level", "behind", "untold")
    )
    at_once = 1 - (1 - LEVEL) / len(others)
    return Standing(lead, level, behind, untold, sum(relation(o, lead, measure, at_once) == "level" for o in behind))


def relation(one: Summary, other: Summary, measure: str, level: float = LEVEL) -> str:
    """Whether two points are "level", `one` is "behind", or it is "untold" for want of two seeds in common."""
    found = paired_difference(one, other, measure, level)
    if found is None or math.isnan(found.half):
        return "untold"
    is_zero = number_text(measure, found)[0].strip("-0.,%") == ""  # equal as written is equal
    return "level" if is_zero or contains_zero(found) else "behind"


def compared(summaries: Sequence[Summary]) -> list[Summary]:
    """The points that a report compares: finished ones, or where fewer than two are, all that have a validation."""
    finished = [summary for summary in summaries if summary.is_ranked]
    begun = [s for s in summaries if "loss" in s.measures or "loss" in s.nonfinite]
    return finished if len(finished) > 1 else begun


def counted_results(summaries: Sequence[Summary]) -> list[Record]:
    """The lines of results.jsonl of the runs that count."""
    return [entry.result for summary in summaries for entry in summary.counted]


def at_common_length(summaries: Sequence[Summary]) -> tuple[int, list[Summary]] | None:
    """The points as they were after the most tokens at which all of them were validated, and how many these are.

    None where all runs that count have seen as many tokens, or no number of tokens has a validation of all.
    """
    taking_part = compared(summaries)
    if len(taking_part) < 2 or len(lengths(counted_results(taking_part))) < 2:
        return None
    found = [validated_at(entry.history) for summary in taking_part for entry in summary.counted]
    tokens = max(set.intersection(*found), default=None)
    if tokens is None:
        return None
    return tokens, [
        summary_of(summary.entries, [cut(entry, tokens) for entry in summary.counted], is_ranked=True)
        for summary in taking_part
    ]


def cut(entry: Entry, tokens: int) -> Entry:
    """A run as it was after so many tokens."""
    found = until(entry.history, tokens)
    facts = {key: value for key, value in entry.result.items() if key not in MEASURES}
    return entry._replace(result={**facts, **reached(found), **measure(found)}, history=found)


def axes_of(labels: Mapping[str, str], runs: Sequence[Run]) -> list[AxisInfo]:
    """The axes that take more than one value in the runs, numbers in order and names as they come."""
    axes = []
    for name, label in labels.items():
        values = list({repr(run.point[name]): run.point[name] for run in runs if name in run.point}.values())
        axis = AxisInfo(name, label, tuple(values))
        if len(values) > 1:
            axes.append(axis._replace(values=tuple(sorted(values))) if axis.is_numeric else axis)
    return axes


def short_name(point: Point, axes: Sequence[AxisInfo]) -> str:
    """A point by its values of the axes that vary, for legends and rows: numbers with the name of their axis."""
    parts = []
    for axis in axes:
        value = point[axis.id]
        parts.append(value_text(value) if isinstance(value, str) else f"{axis.label} {value_text(value)}")
    return ", ".join(parts) or point_text(point)


def number_text(measure: str, found: Interval) -> tuple[str, str]:
    """A mean and its half width as text, the second empty where there is none."""
    digits = MEASURES[measure].digits
    if math.isnan(found.half):
        return format(found.mean, digits), ""
    return format(found.mean, digits), format(found.half, digits)
