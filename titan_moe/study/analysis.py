"""From runs to a table: means and 95 % intervals over seeds, differences paired by seed, what is best."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from titan_moe.study.grid import Point, Run, point_text, value_text
from titan_moe.study.measures import MEASURES
from titan_moe.study.runs import METRICS, History, Record, Status, history, result, status

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
    measures: Mapping[str, Interval]

    @property
    def is_final(self) -> bool:
        """Whether its numbers are of finished runs."""
        return bool(self.counted) and all(entry.status.state == "finished" for entry in self.counted)


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and half width of Student's t-interval: t((1 + level) / 2, n - 1) * s / sqrt(n)."""
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes seconds to import

    count = len(values)
    half = math.nan
    if count > 1:
        half = float(stdtrit(count - 1, (1 + level) / 2)) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values), half, count)


def paired_difference(one: Summary, other: Summary, measure: str) -> Interval | None:
    """Interval of one - other over the seeds that both have, None where there is none in common.

    Runs with the same seed share their initial weights and the order of their data, so that their difference has less
    noise than the two means.
    """
    first, second = by_seed(one, measure), by_seed(other, measure)
    seeds = [seed for seed in first if seed in second]
    return interval([first[seed] - second[seed] for seed in seeds]) if seeds else None


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
        measures = {}
        for key in MEASURES:
            values = [entry.result.get(key, math.nan) for entry in counted]
            values = [value for value in values if math.isfinite(value)]
            if values:
                measures[key] = interval(values)
        point = group[0].run.point
        summaries.append(Summary(point, point_text(point), tuple(group), tuple(counted), measures))
    return summaries


def best(summaries: Sequence[Summary], measure: str) -> Summary | None:
    """The point with the best mean of a measure among finished ones; None where nothing is better than another."""
    found = [summary for summary in summaries if summary.is_final and measure in summary.measures]
    better = MEASURES[measure].better
    if len(found) < 2 or not better:
        return None
    return (min if better == "lower" else max)(found, key=lambda summary: summary.measures[measure].mean)


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
