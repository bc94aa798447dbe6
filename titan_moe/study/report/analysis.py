"""Statistics of a study: means and 95 % intervals over seeds, differences paired by seed, what is best or level."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from titan_moe.study.grid import Point, Run, point_text, value_text
from titan_moe.study.report.likeness import lengths, unlike
from titan_moe.study.report.measures import MEASURES, is_measure, measure_of, set_of
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
    """A run with what its folder says of it."""

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
    counted: tuple[Entry, ...]  # the finished runs, or all where none is finished
    measures: Mapping[str, Interval]  # those that are finite in every run that counts
    nonfinite: Mapping[str, int]  # of the other measures: in how many runs it is NaN or infinite
    is_ranked: bool  # whether its numbers may be compared: its runs are finished, or cut to the same length

    @property
    def left_out(self) -> int:
        """Runs that do not count, as others of the point have finished."""
        return len(self.entries) - len(self.counted)


class Standing(NamedTuple):
    """Which point has the best mean of a measure, and what paired intervals say of the others."""

    lead: Summary  # the point with the best mean
    level: tuple[Summary, ...]  # points whose difference to it has an interval that contains 0
    behind: tuple[Summary, ...]  # points whose difference has an interval without 0
    untold: tuple[Summary, ...]  # points without an interval: fewer than two seeds in common
    level_at_once: int  # how many of those behind are level by intervals that hold for all comparisons at once

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
        """The points that a table or figure marks: the best one, or all that are level; none without an interval."""
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


def contains_zero(difference: Interval) -> bool:
    """Whether an interval leaves open which of the two is the larger; one of a single seed does."""
    return not abs(difference.mean) > difference.half


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
        run_status = status(run.folder, run.config.training.steps)
        entries.append(Entry(run, run_status, result(run, run_status.state), history(run.folder / METRICS)))
    return entries


def summarize(entries: Sequence[Entry]) -> list[Summary]:
    """One summary for each point, in the order of the runs; a point without a measured run has no measures."""
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
    """The summary of a point's runs, with the measures of those that are `counted`."""
    # A mean that left out the seeds that diverged would be a mean of those that were lucky.
    measures, nonfinite = {}, {}
    of_sets = dict.fromkeys(key for entry in counted for key in entry.result if set_of(key))
    for key in (*MEASURES, *of_sets):
        values = [entry.result[key] for entry in counted if key in entry.result]
        if bad := sum(not math.isfinite(value) for value in values):
            nonfinite[key] = bad
        elif values:
            measures[key] = interval(values)
    point = group[0].run.point
    return Summary(point, point_text(point), tuple(group), tuple(counted), measures, nonfinite, is_ranked)


def standing(summaries: Sequence[Summary], measure: str) -> Standing | None:
    """Which point leads in a measure among those that may be compared; None where there is nothing to lead.

    That is so with fewer than two points, where no value is better than another, and where runs that differ in more
    than the study's axes cannot be compared (`likeness.unlike`).
    """
    comparable = [summary for summary in summaries if summary.is_ranked and measure in summary.measures]
    shown = measure_of(measure)
    if len(comparable) < 2 or not shown.better or unlike(counted_results(comparable), measure):
        return None

    # The best mean was picked after the fact, so it alone says little. A point is behind it only where the paired
    # interval of the two leaves out 0.
    lead = (min if shown.better == "lower" else max)(comparable, key=lambda summary: summary.measures[measure].mean)
    others = [summary for summary in comparable if summary is not lead]
    relations = [relation(other, lead, measure) for other in others]
    level, behind, untold = (
        tuple(other for other, one in zip(others, relations, strict=True) if one == word)
        for word in ("level", "behind", "untold")
    )

    # Bonferroni: each of n intervals at 1 - 0.05 / n, and all hold at once with 95 %. It is only counted, not the rule:
    # with three seeds t grows from 4.3 to 31.6 for 50 comparisons, and nearly all points would be level.
    at_once = 1 - (1 - LEVEL) / len(others)
    return Standing(lead, level, behind, untold, sum(relation(o, lead, measure, at_once) == "level" for o in behind))


def relation(one: Summary, other: Summary, measure: str, level: float = LEVEL) -> str:
    """ "level" where the two may be equal, "behind" where `one` is worse; "untold" without two seeds in common."""
    difference = paired_difference(one, other, measure, level)
    if difference is None or math.isnan(difference.half):
        return "untold"
    is_zero = number_text(measure, difference)[0].strip("-0.,%") == ""  # equal as written is equal
    return "level" if is_zero or contains_zero(difference) else "behind"


def compared(summaries: Sequence[Summary]) -> list[Summary]:
    """The points that a report compares: finished ones, or where fewer than two are, all that have a validation."""
    finished = [summary for summary in summaries if summary.is_ranked]
    begun = [s for s in summaries if "loss" in s.measures or "loss" in s.nonfinite]
    return finished if len(finished) > 1 else begun


def counted_results(summaries: Sequence[Summary]) -> list[Record]:
    """The lines of results.jsonl of the runs that count."""
    return [entry.result for summary in summaries for entry in summary.counted]


def at_common_length(summaries: Sequence[Summary]) -> tuple[int, list[Summary]] | None:
    """The points as they were after the most tokens at which all of them were validated; first that number of tokens.

    None where all runs that count are of the same length, or where no number of tokens has a validation of all.
    """
    # Runs of different length are not ranked by their ends: the longer one would win by its length.
    taking_part = compared(summaries)
    if len(taking_part) < 2 or len(lengths(counted_results(taking_part))) < 2:
        return None
    token_counts = [validated_at(entry.history) for summary in taking_part for entry in summary.counted]
    tokens = max(set.intersection(*token_counts), default=None)
    if tokens is None:
        return None

    # A run that is cut has not decayed its learning rate as far as one that ends there; the report says so.
    return tokens, [
        summary_of(summary.entries, [cut(entry, tokens) for entry in summary.counted], is_ranked=True)
        for summary in taking_part
    ]


def cut(entry: Entry, tokens: int) -> Entry:
    """A run as it was after `tokens` tokens."""
    shortened = until(entry.history, tokens)
    facts = {key: value for key, value in entry.result.items() if not is_measure(key)}
    return entry._replace(result={**facts, **reached(shortened), **measure(shortened)}, history=shortened)


def axes_of(labels: Mapping[str, str], runs: Sequence[Run]) -> list[AxisInfo]:
    """The axes that take more than one value in the runs; numbers are sorted, names stay in the order of the runs."""
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


def number_text(measure: str, value: Interval) -> tuple[str, str]:
    """A mean and its half width as text, the second empty where there is none."""
    digits = measure_of(measure).digits
    if math.isnan(value.half):
        return format(value.mean, digits), ""
    return format(value.mean, digits), format(value.half, digits)
