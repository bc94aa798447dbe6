"""The figures that a study's axes suggest: U-curves, heatmaps, dots and bars with intervals, paired differences."""

import math
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titan_moe.study.grid import Point, value_text
from titan_moe.study.report.analysis import (
    AxisInfo,
    Interval,
    Standing,
    Summary,
    by_seed,
    contains_zero,
    counted_results,
    interval,
    number_text,
    seed_differences,
    short_name,
    standing,
)
from titan_moe.study.report.likeness import unlike
from titan_moe.study.report.measures import measure_of
from titan_moe.theme import INK, LIGHT, colour, dashes, marker, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """A figure with the name of its files and its caption."""

    name: str
    caption: str
    figure: "Figure"


def measure_panels(summaries: Sequence[Summary], axes: Sequence[AxisInfo], measure: str) -> list[Panel]:
    """Panels of how a measure depends on the axes; none with fewer than two points that can be compared.

    A numeric axis of three values or more gives a curve, a line for each value of a second axis; two numeric axes also
    give a heatmap; everything else gives rows.
    """
    comparable = [summary for summary in summaries if summary.is_ranked and measure in summary.measures]
    if len(comparable) < 2 or not axes:
        return []

    # The numeric axis with the most values goes along the curve: fewer lines are easier to read.
    numeric = [axis for axis in axes if axis.is_numeric]
    panels = []
    x = max(numeric, key=lambda axis: len(axis.values), default=None)
    if len(axes) <= 2 and x is not None and len(x.values) > 2:
        hue = next((axis for axis in axes if axis is not x), None)
        text = _caption(comparable, measure, x.label, "ringed")
        panels.append(Panel(f"{_in_a_name(measure)}_by_{_in_a_name(x.id)}", text, u_curve(comparable, x, hue, measure)))
    if len(axes) == 2 and len(numeric) == 2:
        figure = heatmap(comparable, axes[0], axes[1], measure)
        text = f"{measure_of(measure).label} by {axes[0].label} and {axes[1].label}: mean over {_seeds(comparable)}"
        panels.append(Panel(f"{_in_a_name(measure)}_heatmap", text + _mark_text(comparable, measure, "framed"), figure))

    # Names have no order, two values make no curve, and three axes need more than a plane.
    if not panels:
        text = _caption(comparable, measure, "point", "orange")
        panels.append(Panel(f"{_in_a_name(measure)}_by_point", text, dots_in_rows(comparable, axes, measure)))
    return panels


def _in_a_name(text: str) -> str:
    """A measure or the id of an axis as part of a file's name: one may have slashes, the other dots."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _caption(summaries: Sequence[Summary], measure: str, axis: str, mark: str) -> str:
    text = f"{measure_of(measure).label} by {axis}: mean over {_seeds(summaries)}"
    if any(len(summary.counted) > 1 for summary in summaries):
        text += " with its 95 % interval; small dots are single seeds"
    return text + _mark_text(summaries, measure, mark)


def _seeds(summaries: Sequence[Summary]) -> str:
    """Words on how many seeds the points of a figure have, and that a single one has no interval."""
    least, most = (choose(len(summary.counted) for summary in summaries) for choose in (min, max))
    if most == 1:
        return "one seed, so that there is no interval"
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def _mark_text(summaries: Sequence[Summary], measure: str, mark: str) -> str:
    """Words for a caption on the points that are marked, or on why none are."""
    if reason := unlike(counted_results(summaries), measure):
        return f"; not ranked: {reason}"
    place = standing(summaries, measure)
    if not _marked(summaries, place) or place is None:
        return ""
    if place.is_clear:
        return f"; {mark}: better than every other by its paired interval"
    return f"; {mark}: the best mean and all that are level with it by their paired intervals"


def _marked(summaries: Sequence[Summary], place: Standing | None) -> Sequence[Summary]:
    """The points to mark; none where all are level, which the title says."""
    return () if place is None or len(place.marked) == len(summaries) else place.marked


def _title(summaries: Sequence[Summary], place: Standing | None, measure: str, place_text: str = "") -> str:
    """A figure's title: which point is best, or how many are level with the best mean."""
    # "best" is said only of a point that is better than every other; "lowest" and "highest" are true of any mean.
    if place is None:
        return ""
    value = number_text(measure, place.lead.measures[measure])[0]
    word = "lowest" if measure_of(measure).better == "lower" else "highest"
    if place.is_clear:
        return f"best{place_text}: {value}"
    if len(place.level) == len(summaries) - 1:
        return f"all level ({word} mean {value})"
    return f"{word}{place_text}: {value}" + (
        f", level with {len(place.level)}" if place.level else ", not known to be best"
    )


def _measure_label(measure: str) -> str:
    shown = measure_of(measure)
    return f"{shown.label} ({shown.unit})" if shown.unit else shown.label


def u_curve(summaries: Sequence[Summary], x: AxisInfo, hue: AxisInfo | None, measure: str) -> "Figure":
    """A measure over a numeric axis, a line for each value of `hue`; the best point, or those level, are ringed."""
    from matplotlib.transforms import ScaledTranslation

    # The legend is below the axes, so the figure grows with it.
    figure = new_figure(3.3 + (0.2 * math.ceil(len(hue.values) / 2) + 0.2 if hue else 0.0))
    axes = figure.add_subplot()
    place = standing(summaries, measure)
    for index, group in enumerate(hue.values if hue else (None,)):
        members = [s for s in summaries if hue is None or s.point[hue.id] == group]
        members.sort(key=lambda s: s.point[x.id])
        if not members:
            continue
        points = [s.point[x.id] for s in members]
        means = [s.measures[measure].mean for s in members]

        # Lines are shifted sideways by a few points of the screen, or intervals at one value would cover each other.
        halves = [0.0 if math.isnan(s.measures[measure].half) else s.measures[measure].half for s in members]
        look: dict[str, Any] = {"color": colour(index), "linestyle": dashes(index), "marker": marker(index)}
        shift = 0.0 if hue is None else 2.5 * (index - (len(hue.values) - 1) / 2)
        shifted = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
        look["transform"] = shifted
        label = None if group is None else value_text(group)
        axes.errorbar(points, means, yerr=halves if any(halves) else None, capsize=3, elinewidth=1, label=label, **look)
        seeds = [(s.point[x.id], value) for s in members for value in by_seed(s, measure).values() if s.counted[1:]]
        if seeds:
            dots: dict[str, Any] = {"markersize": 4, "alpha": 0.5, "color": colour(index), "transform": shifted}
            axes.plot(*zip(*seeds, strict=True), ".", **dots)

        # matplotlib takes no limits from what has a transform of its own, and drew curves off the axes.
        ends = [(p, m + side * h) for p, m, h in zip(points, means, halves, strict=True) for side in (-1, 1)]
        axes.update_datalim([*ends, *seeds])
        for summary in [s for s in _marked(summaries, place) if any(s is member for member in members)]:
            ring: dict[str, Any] = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK}
            axes.plot(summary.point[x.id], summary.measures[measure].mean, "o", transform=shifted, **ring)

    if place is not None:
        values = [place.lead.point[axis.id] for axis in (x, hue) if axis is not None]
        axes.set_title(_title(summaries, place, measure, f" at {', '.join(map(value_text, values))}"))
    _numeric_scale(axes, x.values)
    axes.set_xlabel(x.label)
    axes.set_ylabel(_measure_label(measure))
    _percent(axes.yaxis, measure)
    if hue:
        figure.legend(loc="outside lower center", ncols=min(4, len(hue.values)), title=hue.label)
    return figure


def _numeric_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Scale the x axis to its values, by logarithm where they span a factor of 20, and label those that have room."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    # A coefficient of 0 is often one of the values, and has no logarithm: symlog is linear from there to the first.
    positive = [value for value in values if value > 0]
    wide = bool(positive) and max(positive) / min(positive) >= 20
    if wide and min(values) > 0:
        axes.set_xscale("log")
    elif wide and min(values) == 0:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
    axes.autoscale_view()  # with the margins of this scale
    axes.xaxis.set_minor_locator(NullLocator())

    # Ticks are the study's values, not round numbers. Where labels would overlap, the ends go first, then what fits.
    places = axes.transData.transform([(value, axes.get_ylim()[0]) for value in values])[:, 0]
    span = places.max() - places.min()
    places = (places - places.min()) / (span or 1.0)
    texts = [value_text(value) for value in values]
    halves = [0.012 * len(text) + 0.012 for text in texts]  # of the width of the axes
    labelled: list[int] = []
    for index in (0, len(values) - 1, *range(1, len(values) - 1)):  # the ends have precedence
        if all(abs(places[index] - places[i]) >= halves[index] + halves[i] for i in labelled):
            labelled.append(index)
    labels = [text if index in labelled else "" for index, text in enumerate(texts)]
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FixedFormatter(labels))


def _percent(axis: Any, measure: str) -> None:
    if measure_of(measure).digits.endswith("%"):
        from matplotlib.ticker import PercentFormatter

        axis.set_major_formatter(PercentFormatter(1.0))


def heatmap(summaries: Sequence[Summary], y: AxisInfo, x: AxisInfo, measure: str) -> "Figure":
    """A measure over two axes: a cell for each pair of values; better is lighter, the best, or those level, framed."""
    # A pair of values without a finished run stays NaN, an empty cell.
    grid_YX = np.full((len(y.values), len(x.values)), np.nan)
    for summary in summaries:
        place = y.values.index(summary.point[y.id]), x.values.index(summary.point[x.id])
        grid_YX[place] = summary.measures[measure].mean
    figure = new_figure(0.42 * len(y.values) + 1.45)
    axes = figure.add_subplot()

    # The best value is the lightest whichever way is better, so that figures of different measures read alike.
    lower = measure_of(measure).better == "lower"
    low, high = float(np.nanmin(grid_YX)), float(np.nanmax(grid_YX))
    span = high - low or 1.0
    colours: dict[str, Any] = {"cmap": "cividis_r" if lower else "cividis", "vmin": low, "vmax": low + span}
    axes.pcolormesh(grid_YX, edgecolors="white", linewidth=1, **colours)

    # Colours show the shape, numbers the size; a number is black or white, whichever can be read on its cell.
    place = standing(summaries, measure)
    for (row, column), value in np.ndenumerate(grid_YX):
        if math.isnan(value):
            continue
        share = (high - value if lower else value - low) / span
        text = format(value, measure_of(measure).digits)
        ink = "#000000" if share > 0.55 else "#ffffff"
        size = 8.5 if len(x.values) <= 6 else 7
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=size)

    for summary in _marked(summaries, place):
        from matplotlib.patches import Rectangle

        corner = x.values.index(summary.point[x.id]), y.values.index(summary.point[y.id])
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour(1), linewidth=2.5, clip_on=False))
    axes.set_xticks(np.arange(len(x.values)) + 0.5, [value_text(v) for v in x.values])
    axes.set_yticks(np.arange(len(y.values)) + 0.5, [value_text(v) for v in y.values])
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.set_title("\n".join(filter(None, [_measure_label(measure), _title(summaries, place, measure)])))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def dots_in_rows(summaries: Sequence[Summary], axes_info: Sequence[AxisInfo], measure: str) -> "Figure":
    """A row for each point: a bar where the size counts from zero, else a dot, with its interval and its seeds."""
    # Names are wrapped to leave room for the data, so the figure's height counts their lines.
    shown = measure_of(measure)
    names = ["\n".join(textwrap.wrap(short_name(s.point, axes_info), 26)) for s in summaries]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = new_figure(0.19 * lines + 0.16 * len(summaries) + 0.75)
    axes = figure.add_subplot()

    # A bar's length is read from zero, so only measures whose size means something have one.
    place = standing(summaries, measure)
    marked = _marked(summaries, place)
    for row, summary in enumerate(summaries):
        mean, half, _ = summary.measures[measure]
        is_marked = any(summary is one for one in marked)
        tone = colour(1) if is_marked else colour(0)
        if shown.from_zero:
            axes.barh(row, mean, height=0.6, color=tone, alpha=0.85)
        error = None if math.isnan(half) else half
        axes.errorbar(
            mean,
            row,
            xerr=error,
            color=INK if shown.from_zero else tone,
            marker="none" if shown.from_zero else "D" if is_marked else "o",
            capsize=3,
            elinewidth=1.2,
        )
        seeds = list(by_seed(summary, measure).values())
        if len(seeds) > 1:
            axes.plot(seeds, [row + 0.22] * len(seeds), ".", color=INK, markersize=4, alpha=0.5)

    # The first point is on top, as in the table.
    axes.set_yticks(range(len(summaries)), names)
    axes.set_ylim(len(summaries) - 0.4, -0.6)
    if shown.from_zero:
        axes.set_xlim(left=0)
    else:
        axes.margins(x=0.08)
    axes.set_title(_title(summaries, place, measure), loc="right")
    axes.set_xlabel(_measure_label(measure))
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    _percent(axes.xaxis, measure)
    return figure


def difference_panels(
    summaries: Sequence[Summary], baseline: Point, axes: Sequence[AxisInfo], measure: str
) -> list[Panel]:
    """A panel of how far each point is from the baseline, by seed; none where there is nothing to compare with it."""
    comparable = [summary for summary in summaries if summary.is_ranked and measure in summary.measures]
    base = next((summary for summary in comparable if summary.point == baseline), None)
    if base is None or unlike(counted_results(comparable), measure):
        return []

    # Runs of one seed share their noise, so their difference shows what the two means may hide.
    pairs = [(s, list(seed_differences(s, base, measure).values())) for s in comparable if s is not base]
    pairs = [(summary, values) for summary, values in pairs if values]
    if not pairs:
        return []

    # The caption says how far to trust the intervals: how many seeds, and that they are not to be believed all at once.
    counts = sorted({len(values) for _, values in pairs})
    seeds = "one seed" if counts == [1] else f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
    text = f"{measure_of(measure).label}, less that of the baseline ({short_name(baseline, axes)}) with the same seed: "
    if counts == [1]:
        text += "one seed, so that there is no interval"
    else:
        many = f"; each of the {len(pairs)} intervals is by itself, they do not hold all at once" if pairs[1:] else ""
        text += f"mean over {seeds} with its 95 % interval, grey where that contains 0 or there is none; "
        text += f"small dots are single seeds{many}"
    return [Panel(f"{_in_a_name(measure)}_difference", text, differences(pairs, axes, measure))]


def differences(
    pairs: Sequence[tuple[Summary, Sequence[float]]], axes_info: Sequence[AxisInfo], measure: str
) -> "Figure":
    """A row for each point: its differences to the baseline by seed, their mean and its interval."""
    # The caption names the number of seeds; only where it differs do the names have it, too.
    alike = len({len(values) for _, values in pairs}) == 1
    texts = [short_name(s.point, axes_info) + ("" if alike else f" ({len(values)} seeds)") for s, values in pairs]
    names = ["\n".join(textwrap.wrap(text, 26)) for text in texts]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = new_figure(0.19 * lines + 0.16 * len(pairs) + 0.75)
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=0.8)

    # Grey for a difference that may be none, so that colour is for what was found.
    for row, (_, values) in enumerate(pairs):
        difference: Interval = interval(values)
        tone = LIGHT[6] if contains_zero(difference) else colour(0)
        error = None if math.isnan(difference.half) else difference.half
        axes.errorbar(difference.mean, row, xerr=error, color=tone, marker="o", capsize=3, elinewidth=1.2)
        if len(values) > 1:
            axes.plot(values, [row + 0.22] * len(values), ".", color=INK, markersize=4, alpha=0.5)

    # The first point is on top, as in the table.
    axes.set_yticks(range(len(pairs)), names)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.margins(x=0.08)
    points = " (percentage points)" if measure_of(measure).digits.endswith("%") else ""
    axes.set_xlabel(f"difference in {_measure_label(measure)}{points}")
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    _percent(axes.xaxis, measure)
    return figure
