"""A heatmap of loads: layers x experts, coloured by how far each expert is from its fair share."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 2.0  # twice the fair share or more is the darkest red: one scale, so that pictures of different steps compare
_MAX_TICKS = 16


def load_figure(load: Any, title: str, name: str = "load", mean: str = "ideal load") -> "Figure":
    """A heatmap of `load` (L, E) (tokens per expert, any array or tensor), each layer divided by its mean.

    1.0 is the ideal load (white); below is blue, above is red, which the colour-blind can tell apart. A layer without
    tokens, and NaN, is grey. With at most 16 experts each cell carries its number. `title` stands above, with the
    lowest and the highest ratio. Other positive measures are drawn alike: `name` is theirs, `mean` that of their mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    # Each layer is compared with its own mean. NaN is no part of a mean, and a layer without tokens has no ratios.
    load_LE = np.asarray(load.detach().cpu() if hasattr(load, "detach") else load, dtype=np.float64)
    counts_L1 = np.isfinite(load_LE).sum(axis=1, keepdims=True)  # (L, E) -> (L, 1)
    mean_L1 = np.nansum(load_LE, axis=1, keepdims=True) / np.maximum(counts_L1, 1)
    ratio_LE = np.divide(load_LE, mean_L1, out=np.full_like(load_LE, np.nan), where=mean_L1 > 0)

    # A cell has the same size in all pictures, larger where a number must fit, within limits for the whole.
    num_layers, num_experts = ratio_LE.shape
    has_numbers = num_experts <= 16
    cell = 0.55 if has_numbers else 0.1
    size = (
        np.clip(num_experts * cell + 2.2, 5.5, 16),
        np.clip(num_layers * (0.3 if has_numbers else 0.18) + 1.4, 2.6, 12),
    )
    figure = Figure(figsize=(float(size[0]), float(size[1])), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)

    # NaN is not drawn, so the grey of the axes shows through.
    axes = figure.add_subplot()
    axes.set_facecolor("0.6")
    image = axes.imshow(ratio_LE, cmap="RdBu_r", norm=Normalize(0.0, _MOST), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(0, num_experts, -(-num_experts // _MAX_TICKS)))
    axes.set_yticks(range(0, num_layers, -(-num_layers // _MAX_TICKS)))
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    if np.isfinite(ratio_LE).any():
        title = f"{title} · {np.nanmin(ratio_LE):.2f} to {np.nanmax(ratio_LE):.2f} of the {mean}"
    axes.set_title(title, fontsize=10)

    # Numbers are white on dark cells, which are those far from 1.
    if has_numbers:
        for (layer, expert), ratio in np.ndenumerate(ratio_LE):
            color = "white" if abs(ratio - 1) > 0.65 else "black"
            axes.text(expert, layer, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, ax=axes, pad=0.2 / size[0], ticks=[0, 0.5, 1, 1.5, 2], extend="max")
    bar.set_label(f"{name} / {mean}")
    return figure


def picture(array: Any, title: str, name: str) -> tuple[bytes, tuple[int, int]]:
    """The heatmap of `array` (L, E) as PNG, with its width and height; `name` is `load` or another measure."""
    figure = load_figure(array, title) if name == "load" else load_figure(array, title, name, "mean")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = figure.get_size_inches() * figure.dpi
    return buffer.getvalue(), (int(width), int(height))
