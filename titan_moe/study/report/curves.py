"""Figures of the course of runs: numbers over the steps, and the loads of their experts at the end."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from titan_moe.study.grid import value_text
from titan_moe.study.report.analysis import AxisInfo, Entry, Summary, short_name
from titan_moe.study.report.figures import Panel
from titan_moe.study.report.measures import curve_of
from titan_moe.study.runs import Curve
from titan_moe.theme import GRID, WIDTH, colour, dashes, marker, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 10  # of one figure: more cannot be told apart
MOST_POINTS = 160  # of one line
MOST_LOADS = 12
FALLING = ("/loss", "/perplexity")  # curves whose fall at the beginning would hide the rest


def curve_panels(summaries: Sequence[Summary], axes: Sequence[AxisInfo], names: Sequence[str]) -> list[Panel]:
    """A panel for each number that a run has over its steps: a line for each point, with the range of its seeds."""
    # More lines cannot be told apart. The best by loss are shown, in the order of the study, as in the other figures.
    ranked = sorted(summaries, key=lambda s: s.measures["loss"].mean if "loss" in s.measures else math.inf)
    shown_ids = {id(summary) for summary in ranked[:MOST_LINES]}
    shown = [summary for summary in summaries if id(summary) in shown_ids]

    # The caption says all that the figure leaves out or shows otherwise.
    panels = []
    for name in names:
        figure = curves(shown, axes, name)
        if figure is not None:
            of = f"; the {MOST_LINES} points of lowest last loss" if len(summaries) > MOST_LINES else ""
            text = f"{curve_of(name).label} over the steps: mean over seeds, shaded from lowest to highest{of}"
            if any(_alone(summary, name) for summary in shown):
                text += "; thin and dotted: single runs that failed, or are further than others of their point"
            text += _beginning(name)
            panels.append(Panel(f"curve_{name.replace('/', '_')}", text, figure))
    return panels


def curves(summaries: Sequence[Summary], axes_info: Sequence[AxisInfo], name: str) -> "Figure | None":
    """A number over the steps, a line for each point; None where no run has it."""
    from matplotlib.ticker import MaxNLocator

    # With one axis its values are enough for a legend, under the axis' name.
    lines = []
    title = axes_info[0].label if len(axes_info) == 1 else None
    for index, summary in enumerate(summaries):
        of_seeds = [entry.history.curves[name] for entry in summary.counted if entry.history.curves.get(name)]
        if of_seeds:
            label = value_text(summary.point[axes_info[0].id]) if title else short_name(summary.point, axes_info)
            lines.append((index, label, *_band(of_seeds, curve_of(name).smooth)))
    if not lines:
        return None

    # The legend is below the axes, so the figure grows with its rows, and columns depend on the longest label.
    alone = [(index, curve) for index, summary in enumerate(summaries) for curve in _alone(summary, name)]
    longest = max(len(label) for _, label, *_ in lines)
    columns = 4 if longest < 7 else 2 if longest < 24 else 1
    figure = new_figure(2.9 + 0.19 * math.ceil(len(lines) / columns) + (0.2 if title else 0))
    axes = figure.add_subplot()

    # A line has its colour by the point's place, also where others have no such number: it is the same in all figures.
    for index, label, steps, mean, low, high in lines:
        style: dict[str, Any] = {"color": colour(index), "linestyle": dashes(index)}
        every = 1 if len(steps) <= 24 else len(steps) // 6
        axes.plot(steps, mean, label=label, marker=marker(index), markevery=every, **style)
        if (high > low).any():
            axes.fill_between(steps, low, high, color=colour(index), alpha=0.15, linewidth=0)
    for index, curve in alone:
        axes.plot(*zip(*curve, strict=True), color=colour(index), linestyle=":", linewidth=0.9)
    _cut_beginning(axes, [(steps, mean) for _, _, steps, mean, _, _ in lines], name)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel(curve_of(name).label)
    figure.legend(loc="outside lower center", ncols=columns, title=title)
    return figure


def _alone(summary: Summary, name: str) -> list[Curve]:
    """The curves that the mean over seeds leaves out: runs that do not count, steps that not all seeds have reached."""
    counted = [entry.history.curves[name] for entry in summary.counted if entry.history.curves.get(name)]
    last = min((curve[-1][0] for curve in counted), default=0)
    ahead = [[point for point in curve if point[0] >= last] for curve in counted]
    others = [
        e.history.curves[name]
        for e in summary.entries
        if all(e is not c for c in summary.counted) and e.history.curves.get(name)
    ]
    return [curve for curve in [*ahead, *others] if len(curve) > 1]


def _band(of_seeds: Sequence[Sequence[tuple[int, float]]], smooth: bool) -> tuple[np.ndarray, ...]:
    """The steps (K,) that all seeds have, and the mean, lowest and highest (K,) of the (smoothed) curves at them."""
    common = sorted(set.intersection(*({step for step, _ in curve} for curve in of_seeds)))
    steps = np.array(common)  # (N,)
    values_SN = np.array([[dict(curve)[step] for step in common] for curve in map(list, of_seeds)], dtype=float)

    # A running mean of the steps before, at the beginning of those that there are, so that no curve looks ahead.
    window = max(1, len(common) // 30) if smooth else 1
    if window > 1:
        kernel = np.ones(window)
        counts = np.convolve(np.ones(len(common)), kernel)[: len(common)]
        values_SN = np.stack([np.convolve(row, kernel)[: len(common)] / counts for row in values_SN])

    # An SVG has every point of a line in it: thousands would make the page large, and no eye tells them apart.
    plotted = np.unique(np.linspace(0, len(common) - 1, min(len(common), MOST_POINTS)).round().astype(int))
    values_SN = values_SN[:, plotted]  # (S, N) -> (S, K)
    return steps[plotted], values_SN.mean(0), values_SN.min(0), values_SN.max(0)


def _beginning(name: str) -> str:
    """Words for the caption of a curve whose beginning may be off the scale."""
    return "; its fall in the first quarter may be off the scale" if name.endswith(FALLING) else ""


def _cut_beginning(axes: "Axes", lines: Sequence[tuple[np.ndarray, np.ndarray]], name: str) -> None:
    """Fit the y axis to what comes after the first quarter of the steps, where the fall before would hide it."""
    if not name.endswith(FALLING):
        return
    last = max(steps[-1] for steps, _ in lines)
    later = [value for steps, mean in lines for value in mean[steps >= last / 4] if math.isfinite(value)]
    everything = [value for _, mean in lines for value in mean if math.isfinite(value)]
    if later and max(everything) - min(later) > 1.5 * (max(later) - min(later)) > 0:
        room = 0.06 * (max(later) - min(later))
        axes.set_ylim(min(later) - room, max(later) + room)


def load_panel(summaries: Sequence[Summary], axes_info: Sequence[AxisInfo]) -> list[Panel]:
    """A panel with the load at the last validation, layers x experts, of the first run of each point that has one."""
    # A mean over seeds would hide what is shown: which experts are full differs from seed to seed.
    entries: list[tuple[str, Entry]] = []
    for summary in summaries:
        entry = next((entry for entry in summary.counted if entry.history.load), None)
        if entry is not None:
            entries.append((short_name(summary.point, axes_info), entry))
    if not entries:
        return []
    shown = entries[:MOST_LOADS]
    of = f" (the first {MOST_LOADS} points)" if len(entries) > MOST_LOADS else ""

    # Seed and step stand once in the caption where they are the same for all, else with each name.
    alike = {
        len({entry.run.seed for _, entry in shown}),
        len({entry.history.validations[-1]["step"] for _, entry in shown}),
    }
    first = shown[0][1]
    if alike == {1}:
        which = f"seed {first.run.seed}, step {first.history.validations[-1]['step']:,}"
    else:
        which = "seed and step by its name"
        shown = [(f"{n} (seed {e.run.seed}, step {e.history.validations[-1]['step']:,})", e) for n, e in shown]
    text = (
        f"load of each expert (columns) in each MoE layer (rows) at the last validation, over its even share{of}; "
        f"{which}: 1 is even (white), less is blue, more is red"
    )
    return [Panel("loads", text, loads([(name, np.array(entry.history.load)) for name, entry in shown]))]


def loads(named_loads: Sequence[tuple[str, np.ndarray]]) -> "Figure":
    """Small heatmaps of loads (L, E), each layer divided by its mean, on one scale from 0 to 2."""
    from matplotlib.colors import Normalize

    # Maps are as high as they have layers, up to a limit, and as wide as the page allows.
    columns = min(2, len(named_loads))
    lines = math.ceil(len(named_loads) / columns)
    layers = max(load_LE.shape[0] for _, load_LE in named_loads)
    figure = new_figure(lines * (0.55 + min(2.2, 0.13 * layers + 0.25)) + 0.75, WIDTH)
    grid = figure.subplots(lines, columns, squeeze=False)

    # One scale for all maps, so that a colour means the same in each. A layer without tokens is 0, not NaN.
    norm, mesh = Normalize(0.0, 2.0), None
    for place, axes in enumerate(grid.flat):
        axes.grid(visible=False)
        if place >= len(named_loads):
            axes.set_visible(False)
            continue
        name, load_LE = named_loads[place]
        mean_L1 = load_LE.mean(1, keepdims=True)
        ratio_LE = np.divide(load_LE, mean_L1, out=np.zeros_like(load_LE, dtype=float), where=mean_L1 > 0)
        mesh = axes.pcolormesh(ratio_LE, cmap="RdBu_r", norm=norm, edgecolors=GRID, linewidth=0.3)
        axes.invert_yaxis()
        axes.set_title("\n".join(textwrap.wrap(name, 26)), fontsize=8, fontweight="normal")
        axes.set_xticks([0.5, load_LE.shape[1] - 0.5], ["0", str(load_LE.shape[1] - 1)])
        axes.set_yticks([0.5, load_LE.shape[0] - 0.5], ["0", str(load_LE.shape[0] - 1)])
        axes.tick_params(length=0, labelsize=8)

    # Axes are named once, in the corner, and one bar serves all maps.
    assert mesh is not None
    grid[-1, 0].set_xlabel("expert")
    grid[-1, 0].set_ylabel("layer")
    bar = figure.colorbar(
        mesh, ax=grid, location="bottom", shrink=0.8, aspect=40, ticks=[0, 0.5, 1, 1.5, 2], extend="max"
    )
    bar.set_label("load / even share")
    return figure
