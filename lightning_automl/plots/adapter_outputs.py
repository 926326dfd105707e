"""What adapters add to their blocks: histograms side by side, their sizes and gradients over the epochs."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Histograms of so many layers can be told apart on a page.
LAYERS = 4
#: Of the histograms, in standard deviations; they are symmetric around 0.
BIN_WIDTH = 0.125
_LONGEST = 28  # characters above a panel
_PEAK = 0.005  # a smaller share of zeros is not drawn by itself
#: Between these ratios neither drowns the other.
USUAL = (0.01, 10.0)


def adapter_outputs(rows: Sequence[Mapping[str, Any]], layers: int = LAYERS) -> "Figure":
    """Draw the outputs of blocks and of their adapters, and how both and the gradients went over the epochs.

    Above, for layers from the first to the last, what block (grey) and adapter give, in standard deviations of the
    block's output and each as high as its highest bin; exact zeros, as a ReLU makes them, are a line by themselves. In
    the middle, the adapter's output alone in its own standard deviations, with the normal distribution that a fresh
    adapter resembles. Below, over the epochs and for all layers, the ratio of standard deviations and the gradient
    norms.

    Args:
        rows: One mapping an epoch, as `callbacks.AdapterStatistics` records them: ``epoch`` and ``layers``; histograms
            are taken from the newest one.
        layers: How many have their histograms drawn: first and last, and evenly between them.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    newest = rows[-1]["layers"] if rows else []
    chosen = [newest[at] for at in _spread(len(newest), layers)]
    figure = Figure(figsize=(max(7.2, 0.6 + 2.2 * len(chosen)), 7.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.4, 3.0])
    above, below = parts
    if chosen:
        panels = above.subplots(2, len(chosen), squeeze=False, sharey="row")
        for column, layer in enumerate(chosen):
            _beside(panels[0, column], layer)
            _alone(panels[1, column], layer)
        panels[0, 0].set_ylabel("share / highest share")
        panels[1, 0].set_ylabel("density")
        marks: dict[str, Any] = {}
        for axes in panels.flat:
            handles, labels = axes.get_legend_handles_labels()
            marks |= dict(zip(labels, handles, strict=True))
        above.legend(marks.values(), marks.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _over_epochs(below, rows, [layer["layer"] for layer in newest])
    return figure


def _beside(axes: "Axes", layer: Mapping[str, Any]) -> None:
    block, adapter, ratio = layer["block"], layer["adapter"], layer["ratio"]
    edges, shares = _histogram(block)
    axes.stairs(shares / max(shares.max(), 1e-12), edges, fill=True, color="0.75", label="block")
    if block["zero_fraction"] > _PEAK:
        axes.plot([0, 0], [0, 1], color="0.35", linewidth=2.5, solid_capstyle="butt", label="zeros of the block")
    if _positive(ratio):
        edges, shares = _histogram(adapter)
        axes.stairs(
            shares / max(shares.max(), 1e-12), edges * ratio, color=COLOURS["val"], lw=1.6, zorder=3, label="adapter"
        )
    else:
        axes.plot([0, 0], [0, 1], color=COLOURS["val"], linewidth=1.6, label="adapter")
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1])
    axes.set_title(f"{_end_of(layer['layer'])}\n\n", fontsize=9, parse_math=False)
    shape = f"{100 * block['zero_fraction']:.0f} % zeros, skewness {_short(block['skewness'])}"
    text = f"block: {shape}\nratio of standard deviations: {_short(ratio)}"
    axes.text(0.5, 1.03, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=7.5, in_layout=False)
    _finish(axes, "block")


def _alone(axes: "Axes", layer: Mapping[str, Any]) -> None:
    adapter = layer["adapter"]
    if _positive(adapter["std"]):
        edges, shares = _histogram(adapter)
        axes.stairs(shares / np.diff(edges), edges, fill=True, color=COLOURS["val"], alpha=0.5)
    places = np.linspace(-4, 4, 161)
    normal = np.exp(-(places**2) / 2) / math.sqrt(2 * math.pi)
    axes.plot(places, normal, color="black", linestyle="--", linewidth=1, label="normal distribution")
    shape = f"skewness {_short(adapter['skewness'])}, kurtosis {_short(adapter['kurtosis'])}"
    axes.set_title(f"adapter: {shape if _positive(adapter['std']) else 'constant'}", fontsize=7.5)
    _finish(axes, "adapter")


def _finish(axes: "Axes", unit: str) -> None:
    axes.set_xlim(-4, 4)
    axes.set_xticks([-3, 0, 3])
    axes.set_xlabel(f"output / std of {unit}", fontsize=9)


def _over_epochs(figure: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    # The last fifth of viridis is too bright for lines on white.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.85, 256)))
    ratio, gradient = panels = figure.subplots(1, 2)
    for at, name in enumerate(names):
        found = [(row["epoch"] + 1, layer) for row in rows for layer in row["layers"] if layer["layer"] == name]
        for axes, key in ((ratio, "ratio"), (gradient, "gradient_norm")):
            points = [(epoch, layer[key]) for epoch, layer in found if _positive(layer[key])]
            if points:
                colour = colours(at / max(1, len(names) - 1))
                marker = "o" if len(points) < 3 else None
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, marker=marker, markersize=4)
    for axes, label in ((ratio, "std of adapter / std of block"), (gradient, "gradient norm of adapter")):
        axes.set_yscale("log")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _mark_unusual(ratio)
    if len(names) > 1:
        bar = figure.colorbar(ScalarMappable(Normalize(1, len(names)), colours), ax=panels, pad=0.02)
        bar.set_label("layer, from first to last")
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _mark_unusual(axes: "Axes") -> None:
    """Shade where one drowns the other; the words stand at the edges, where no line is."""
    known = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float)]
    low, high = (
        min([USUAL[0] / 3, *(each / 2.5 for each in known)]),
        max([USUAL[1] * 3, *(each * 2.5 for each in known)]),
    )
    axes.set_ylim(low, high)
    aside: dict[str, Any] = {"ha": "right", "fontsize": 8, "color": "0.35", "transform": axes.get_yaxis_transform()}
    axes.axhspan(low, USUAL[0], color="0.92", zorder=0)
    axes.text(0.98, low * 1.15, "adapter drowned", va="bottom", **aside)
    axes.axhspan(USUAL[1], high, color="0.92", zorder=0)
    axes.text(0.98, high / 1.15, "block drowned", va="top", **aside)


def _histogram(output: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges in standard deviations, and the shares between them without those of exact zeros."""
    shares = np.asarray(output["histogram"]["shares"], float)
    edges = np.asarray((np.arange(len(shares) + 1) - len(shares) / 2) * BIN_WIDTH, float)
    shares[len(shares) // 2] = max(0.0, shares[len(shares) // 2] - output["zero_fraction"])
    return edges, shares


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _end_of(name: str) -> str:
    """Of a long name its end, which is where layers differ."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _short(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "unknown"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}").replace("-", "\N{MINUS SIGN}")


def _spread(number: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``number`` places, first and last among them."""
    return sorted({round(place) for place in np.linspace(0, number - 1, min(number, wanted))})
