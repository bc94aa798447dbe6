"""The look of reports: colours, figures that a page can embed in light and dark mode, and the page around them."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_moe.runtime.files import write_atomic

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart (after Okabe and Ito), each with a contrast of 3 or more to its page.
LIGHT = ("#0072b2", "#d55e00", "#00805d", "#b5548c", "#a66f00", "#3290c5", "#5d5d5d", "#7b2d6b")
DARK = ("#4fb3f0", "#ff8a4c", "#2ec79b", "#e79cc6", "#f0b429", "#a5d8ff", "#b8b8b8", "#c792ea")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
INK, GRID = "#1b1c1e", "#d9dadc"  # text and frames; lines behind the data
WIDTH = 4.6  # inches of a panel, so that its letters are readable on a phone

RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "titan_moe",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and save in the report's style."""
    from matplotlib import rc_context

    with rc_context(RC):
        yield


def colour(index: int) -> str:
    """Colour of the series with this number."""
    return LIGHT[index % len(LIGHT)]


def marker(index: int) -> str:
    """Marker of the series with this number."""
    return MARKERS[index % len(MARKERS)]


def dashes(index: int) -> object:
    """Line style of the series with this number: another one as soon as colours repeat."""
    return DASHES[index // len(LIGHT) % len(DASHES)]


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure that no window belongs to, inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg_of(figure: "Figure") -> str:
    """The figure as SVG, without a background; its layout stays as it is now."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # keeps the layout, which would be computed again for each file
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def save_figure(figure: "Figure", folder: Path, name: str) -> str:
    """Write NAME.png and NAME.svg, dark on white; the SVG without its background."""
    svg = svg_of(figure)
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    write_atomic(folder / f"{name}.svg", svg.replace("<svg ", '<svg style="background: white" ', 1))
    return svg


def embedded(svg: str, name: str, label: str) -> "Markup":
    """The SVG of `svg_of` as an element of a page, its colours variables of the page, for light and dark mode.

    `label` is plain text for those who can't see the figure. Text inside of the figure was escaped by matplotlib.
    """
    from markupsafe import Markup, escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for index, light in enumerate(LIGHT):
        svg = svg.replace(light, f"var(--series-{index})")
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    # matplotlib gives every figure the same ids; on one page each needs its own.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    width, height = (float(size) for size in re.findall(r' (?:width|height)="([\d.]+)pt"', svg)[:2])
    head = f'<svg role="img" aria-label="{escape(label)}" style="max-width:{width * 4 / 3:.0f}px" '
    svg = re.sub(r'^<svg ([^>]*?)width="[\d.]+pt" ?|(?<=^)<svg ', lambda _: head, svg, count=1)
    return Markup(svg.replace(f' height="{height:g}pt"', "", 1))


def render(package: str, name: str, context: Mapping[str, Any]) -> str:
    """Fill in the template `name` of `package`, which extends page.html.j2: all text is escaped, nothing is left open.

    A template formats nothing: numbers and names come to it as text.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader(__name__, "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(context, colours=list(zip(LIGHT, DARK, strict=True)))
