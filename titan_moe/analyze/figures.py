"""Figures of an analysis: maps of numbers by layer and expert, matrices of pairs of experts, lines over the layers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titan_moe.theme import GRID, INK, WIDTH, colour, dashes, marker, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

SMALL = 2.9  # inches of a map of which four stand in a row


class Scale(NamedTuple):
    """What the colours of a map mean; maps that are to be compared share one."""

    label: str
    colours: str  # a colour map of matplotlib
    low: float
    high: float
    unit: str = ""  # behind a number that is read from the map
    ticks: Sequence[float] = ()
    is_log: bool = False
    is_cut: bool = False  # numbers beyond the ends have the colour of the end


class Map(NamedTuple):
    """Numbers in rows and columns, NaN where there is none, and what they are called."""

    values: np.ndarray  # (R, C)
    scale: Scale
    row: str  # what a row is, "layer"
    rows: Sequence[str]
    column: str
    columns: Sequence[str]


class Panel(NamedTuple):
    """A figure with its name on the page, its caption, and the map that a reader can ask for single numbers."""

    name: str
    caption: str
    figure: "Figure"
    map: Map | None = None


class Line(NamedTuple):
    """A line over the layers or over the steps, with a band or single points around it."""

    label: str
    values: np.ndarray  # NaN where there is none
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    points: np.ndarray | None = None  # (x, points): as small dots


LOAD = Scale("load / even share", "RdBu_r", 0.0, 2.0, " times the even share", (0, 0.5, 1, 1.5, 2), is_cut=True)
LIFT = Scale(
    "times as often as by chance", "RdBu_r", 0.25, 4.0, " times chance", (0.25, 0.5, 1, 2, 4), is_log=True, is_cut=True
)


def numbers(values: Any) -> np.ndarray:
    """Nested lists of numbers and null as an array with NaN."""
    return np.array(values, dtype=np.float64)  # numpy makes NaN of None


def over_even(counts: Any) -> np.ndarray:
    """Counts (..., E) over the mean of their last dimension, NaN where nothing was counted."""
    counts_E = np.asarray(counts, dtype=np.float64)
    mean = counts_E.mean(-1, keepdims=True)
    return np.divide(counts_E, mean, out=np.full_like(counts_E, np.nan), where=mean > 0)


def span(values: np.ndarray, label: str, unit: str = "", *, signed: bool = False, least: float = 1e-3) -> Scale:
    """A scale that all of `values` fit on: from 0 to the largest, or as far below 0 as above where they have signs."""
    finite = np.abs(values[np.isfinite(values)]) if signed else values[np.isfinite(values)]
    high = max(least, float(finite.max())) if finite.size else 1.0
    return Scale(label, "RdBu_r" if signed else "cividis", -high if signed else 0.0, high, unit=unit)


def norm_of(scale: Scale) -> "Normalize":
    """How matplotlib turns a number into a colour."""
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if scale.is_log else Normalize)(scale.low, scale.high, clip=True)


def levels(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Places of values on a scale, 0 at its low to 254 at its high end; 255 where there is none."""
    share = np.ma.filled(norm_of(scale)(np.nan_to_num(values, nan=scale.low)), 0.0)
    return np.where(np.isfinite(values), np.round(share * 254), 255).astype(np.uint8)


def palette(scale: Scale, count: int = 64) -> str:
    """Colours of a scale from low to high, six hexadecimal digits each, for a page to draw other layers with."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return "".join(to_hex(colormaps[scale.colours](i / (count - 1)))[1:] for i in range(count))


def heatmap(shown: Map, width: float = WIDTH, title: str = "", *, has_numbers: bool = True) -> "Figure":
    """A map as a figure, with its scale below; cells without a number are grey, few cells have theirs in them.

    Maps that are `width` wide have the same size; `has_numbers` is for those that do not change.
    """
    from matplotlib.patches import Rectangle

    # Cells keep their height until the map is as high as it is wide; a matrix of pairs is square.
    rows, columns = shown.values.shape
    scale, norm = shown.scale, norm_of(shown.scale)
    square = shown.row.startswith("expert")
    height = width * 0.8 if square else float(np.clip(0.2 * rows, 0.3, width * 0.8))
    figure = new_figure(height + (1.15 if title else 0.95), width)
    axes, below = figure.subplots(2, 1, height_ratios=[height, 0.09])
    axes.add_patch(Rectangle((-0.5, -0.5), columns, rows, facecolor=GRID, zorder=0))
    image = axes.imshow(shown.values, norm=norm, cmap=scale.colours, aspect="auto", interpolation="none", gid="map")
    if has_numbers and columns <= 8 and rows <= 24 and width == WIDTH:
        _numbers_in_cells(axes, shown.values, norm)

    # As many names as have room: those of columns by their length, those of rows by the height of a line.
    most = max(2, int((width - 0.8) / (0.1 + 0.075 * max(map(len, shown.columns)))))
    _ticks(axes.xaxis, shown.columns, most)
    _ticks(axes.yaxis, shown.rows, max(2, int(height / 0.17)))
    axes.set_xlabel(shown.column)
    axes.set_ylabel(shown.row)
    axes.set_title(title)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)

    # The bar stands below, since sideways it would take room from the map on a phone.
    bar = figure.colorbar(image, cax=below, orientation="horizontal", extend="max" if scale.is_cut else "neither")
    bar.outline.set_visible(False)
    bar.set_label(scale.label)
    if scale.ticks:
        bar.set_ticks(list(scale.ticks), labels=[f"{tick:g}" for tick in scale.ticks])
        bar.minorticks_off()
    else:
        bar.ax.locator_params(nbins=5)
    return figure


def _numbers_in_cells(axes: "Axes", values: np.ndarray, norm: "Normalize") -> None:
    """Write each cell's number into it, black or white, whichever can be read on its colour."""
    # Three digits of the largest: losses without an expert differ by thousandths, of which two decimals show nothing.
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    decimals = min(5, max(2, 2 - math.floor(math.log10(largest)))) if largest else 2
    image = axes.images[0]
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        red, green, blue, _ = image.cmap(float(norm(value)))
        ink = "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
        axes.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", color=ink, fontsize=8.2)


def _ticks(axis: Any, names: Sequence[str], most: int) -> None:
    """Name every row or column, or every second, fifth, tenth ..., so that at most so many names stand."""
    steps = (digit * 10**power for power in range(6) for digit in (1, 2, 5))
    step = next(step for step in steps if len(names) / step <= most)
    places = range(0, len(names), step)
    axis.set_ticks(list(places), labels=[names[place] for place in places])


def lines(x: Sequence[float], series: Sequence[Line], x_label: str, y_label: str) -> "Figure":
    """Numbers over the layers or the steps, a line for each of `series`."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(2.5 + (0.22 * len(series) if len(series) > 1 else 0.0))
    axes = figure.add_subplot()
    for index, line in enumerate(series):
        look: dict[str, Any] = {"color": colour(index), "linestyle": dashes(index), "marker": marker(index)}
        axes.plot(x, line.values, label=line.label, markersize=4, **look)
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, color=colour(index), alpha=0.2, linewidth=0)
        if line.points is not None:
            places = np.repeat(np.asarray(x, dtype=float), line.points.shape[1])
            alpha = 0.5 if line.points.size <= 200 else 0.15  # many dots would be one black bar
            axes.plot(places, line.points.ravel(), ".", color=INK, markersize=3, alpha=alpha)

    # Names of lines stand below, where they cover nothing.
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(x) <= 4:
        axes.set_xticks(list(x))
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=1 if max(len(line.label) for line in series) > 30 else 2)
    return figure
