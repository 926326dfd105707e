"""Figures about architecture searches: how strengths and guards went, and a found genotype beside random ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.genotype import KINDS, operation_kind
from lightning_automl.plots.marks import BEYOND, ValueScale
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Panels beside each other: two figures of them fit side by side on a wide page, and one fits on a phone.
COLUMNS = 3
#: Of longer searches so many epochs are drawn, evenly spread.
EPOCHS = 120
_WIDTH, _PANEL, _ROW = 4.5, 1.1, 0.34  # inches: of a figure, the height of a panel and of a row of a strip plot
_SHORT = 20  # characters; longer labels leave room for two beside each other
_NEAR = 0.02  # share of a level below which values differ too little from it to fill a picture
#: Operations of one kind have one colour, and are told apart by these.
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.3)), (0, (1.2, 1)), (0, (5, 1, 1, 1)), (0, (7, 1)), (0, (3, 1, 1, 1, 1, 1)))
_FOUND: dict[str, Any] = {"marker": "D", "color": COLOURS["val"], "markeredgecolor": "black"}
_RANDOM: dict[str, Any] = {"marker": "o", "color": COLOURS["train"], "markeredgecolor": "black"}


@dataclass(frozen=True)
class Curve:
    """Values over the epochs.

    Attributes:
        label: In the legend.
        points: Epoch, counted from 1, and value; what is not finite is left out.
        colour: Of the line.
        dashes: Of the line.
    """

    label: str
    points: Sequence[tuple[int, float]]
    colour: str
    dashes: Any = "-"


def operation_styles(operations: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How the lines of operations look: the colour of their kind, and dashes that tell them apart within it."""
    styles, used = {}, dict.fromkeys(KINDS, 0)
    for name in operations:
        kind = operation_kind(name)
        styles[name] = {"color": KINDS[kind].colour, "linestyle": _DASHES[used[kind] % len(_DASHES)]}
        used[kind] += 1
    return styles


def edge_strengths(
    title: str,
    operations: Sequence[str],
    edges: Sequence[tuple[int, int]],
    epochs: Sequence[int],
    strengths: NDArray[np.float64],
    *,
    chosen: Sequence[str | None] = (),
    marked: int | None = None,
    inputs: int = 2,
) -> "Figure":
    """Draw how strong each operation was on each edge of a cell, over the epochs: a panel an edge.

    Args:
        title: Of the figure.
        operations: Their names; each has the same line in all panels.
        edges: Source and target node of each.
        epochs: Counted from 0, ascending.
        strengths: ``(epochs, edges, operations)``; NaN where there is none.
        chosen: For each edge the operation that the chosen genotype has there, or None; these panels are white and
            their line is thick, others are grey.
        marked: The chosen epoch, counted from 0.
        inputs: Number of input nodes, which are called as in `genotype_figure`.

    Returns:
        The figure. All panels have one axis of strengths, which need not begin at 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    some = _spread(len(epochs))
    across, values = np.asarray(epochs)[some] + 1, np.asarray(strengths)[some]
    styles = operation_styles(operations)
    rows = math.ceil(len(edges) / COLUMNS)
    legend_rows = math.ceil(len(operations) / COLUMNS)
    height = _PANEL * rows + 0.6 + 0.17 * legend_rows
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(edges):
            axes.set_axis_off()
            continue
        own = chosen[place] if place < len(chosen) else None
        for column, name in enumerate(operations):
            axes.plot(across, values[:, place, column], **_line(styles[name], name == own, len(across)))
        if marked is not None:
            axes.axvline(marked + 1, color="0.5", linewidth=0.8, zorder=0)
        source, target = edges[place]
        begin = f"$c_{{k-{inputs - source}}}$" if source < inputs else str(source)
        name = shorten(own, 17).replace("$", r"\$") if own else ""
        text = f"{begin} \N{RIGHTWARDS ARROW} {target}{': ' if name else ''}{name}"
        colour = "black" if own or not any(chosen) else "0.45"
        axes.set_title(text, fontsize=7.5, color=colour, pad=3.5)
        if any(chosen) and not own:
            axes.set_facecolor("0.93")
        axes.tick_params(labelsize=7, length=2, pad=1.5)
        axes.grid(alpha=0.3, linewidth=0.5)
        if place >= COLUMNS * (rows - 1):
            axes.set_xlabel("epoch", fontsize=7.5, labelpad=1)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    panels[0, 0].yaxis.set_major_locator(MaxNLocator(4))
    panels[0, 0].margins(y=0.06)
    panels[0, 0].ticklabel_format(axis="y", useOffset=False)
    handles = [Line2D([], [], linewidth=1.4, label=name, **styles[name]) for name in operations]
    figure.suptitle(title, fontsize=10, parse_math=False)
    if handles:
        labels = [shorten(name) for name in operations]
        figure.legend(
            handles, labels, loc="outside lower center", ncols=COLUMNS, frameon=False, fontsize=7.5, handlelength=2.4
        )
    return figure


def _line(style: Mapping[str, Any], chosen: bool, epochs: int) -> dict[str, Any]:
    marker = {"marker": "o", "markersize": 3} if epochs < 2 else {}
    return {**style, "linewidth": 2.2 if chosen else 0.9, "zorder": 3 if chosen else 2, **marker}


def _spread(number: int) -> NDArray[np.int64]:
    """At most `EPOCHS` of so many places, the first and the last among them."""
    places: NDArray[np.int64] = np.unique(np.linspace(0, number - 1, min(number, EPOCHS)).round().astype(np.int64))
    return places if number else np.zeros(0, np.int64)


def over_epochs(
    curves: Sequence[Curve],
    *,
    title: str,
    unit: str = "",
    marks: Mapping[str, int] | None = None,
    levels: Mapping[str, float] | None = None,
    whole: bool = False,
) -> "Figure":
    """Draw what was watched in a search over its epochs.

    Args:
        curves: A line each.
        title: What they are.
        unit: Of the values.
        marks: Epochs, counted from 1, with a vertical line each, by their names.
        levels: Values above 0 with a horizontal line each, by their names; what is near to one is drawn as near.
        whole: Whether values are counts.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    largest = 0.0
    for curve in curves:
        points = [point for point in curve.points if math.isfinite(point[1])]
        if points:
            largest = max(largest, *(abs(value) for _, value in points))
            style: dict[str, Any] = {"color": curve.colour, "linestyle": curve.dashes, "label": curve.label}
            style |= {"drawstyle": "steps-mid"} if whole and len(points) > 2 else {}
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 3 else None, **style)
    for (name, epoch), dashes in zip((marks or {}).items(), (_DASHES * 2)[: len(marks or {})], strict=False):
        axes.axvline(epoch, color="0.45", linewidth=1, linestyle=dashes, label=name, zorder=0)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="black", linewidth=1, linestyle=":", label=name)
        low, high = axes.get_ylim()
        low = min(low, (1 - _NEAR) * level)
        axes.set_ylim(low, max(high, level + 0.05 * (level - low)))
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=whole))
    if whole:
        axes.set_ylim(-0.2, max(2.0, largest) + 0.4)
    elif largest >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = 3 if max(map(len, labels)) < _SHORT else 2
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    return figure


def genotype_values(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    means: Sequence[tuple[float, float, float]],
    found: Sequence[bool],
    *,
    metric: str,
    maximize: bool,
    expected: tuple[float, float, float] | None = None,
) -> "Figure":
    """Draw what genotypes have reached: a row each, with a point a seed, their mean and its interval.

    Args:
        names: Of the genotypes, in the order of the rows.
        values: Of their runs; what is not finite is left out.
        means: For each, mean with the lower and the upper end of its interval; NaN where there is none.
        found: Whether each is one that a search has found; its marks are diamonds.
        metric: What the values are.
        maximize: Whether more is better.
        expected: Mean of the random genotypes, and the ends between which another one would be expected, or NaN.

    Returns:
        The figure. Values far from the best are triangles at its edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(5.0, 1.35 + _ROW * len(names)), layout="constrained")
    axes = figure.subplots()
    every = [value for own in values for value in own]
    ends = [end for row in means for end in row if math.isfinite(end)]
    scale = ValueScale.of(every, maximize)
    scale = _widened(scale, [*ends, *(expected or ())], every)
    handles: list[Any] = []
    if expected is not None:
        mean, low, high = expected
        axes.axvline(mean, color="0.35", linewidth=1, linestyle="--", zorder=1)
        handles.append(Line2D([], [], color="0.35", linewidth=1, linestyle="--", label="mean of the random ones"))
        if math.isfinite(low) and math.isfinite(high):
            handles.append(axes.axvspan(low, high, color="0.9", zorder=0, label="where another one would be (95 %)"))
    for row, (own, ends_of, is_found) in enumerate(zip(values, means, found, strict=True)):
        _strip(axes, scale, row, own, ends_of, _FOUND if is_found else _RANDOM)
    scale.apply(axes.xaxis)
    axes.set_yticks(range(len(names)), labels=[shorten(name) for name in names], fontsize=9, parse_math=False)
    for label, is_found in zip(axes.get_yticklabels(), found, strict=True):
        label.set_fontweight("bold" if is_found else "normal")
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    _value_axis(axes, f"{metric} ({'more' if maximize else 'less'} is better)")
    marks = [("a seed", _RANDOM | {"markersize": 4, "alpha": 0.6, "markeredgewidth": 0})]
    marks += [("mean, 95 % interval over seeds", _RANDOM | {"markersize": 6})]
    marks += [("the same of the found one", _FOUND | {"markersize": 6})] if any(found) else []
    drawn: list[Any] = [Line2D([], [], linestyle="", label=label, **style) for label, style in marks]
    if names:
        figure.legend(handles=[*drawn, *handles], loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _widened(scale: ValueScale, ends: Sequence[float], values: Sequence[float]) -> ValueScale:
    """With room for the ends of intervals, but not so much that values cannot be told apart any more."""
    known = [end for end in ends if math.isfinite(end)]
    inside = [value for value in values if math.isfinite(value) and scale.contains(value)]
    if scale.log or not known or len(inside) < 2:
        return scale
    room = 0.75 * (max(inside) - min(inside))
    low = min(scale.low, max(min(known) - 0.1 * room, min(inside) - room))
    high = max(scale.high, min(max(known) + 0.1 * room, max(inside) + room))
    return ValueScale(low, high)


def _strip(
    axes: "Axes",
    scale: ValueScale,
    row: int,
    values: Sequence[float],
    mean: tuple[float, float, float],
    style: Mapping[str, Any],
) -> None:
    small = {**style, "markersize": 4, "alpha": 0.6, "markeredgewidth": 0, "linestyle": "", "zorder": 2}
    for value in values:
        if not math.isfinite(value):
            continue
        if scale.contains(value):
            axes.plot(value, row - 0.18, **small)
        else:
            edge, marker = scale.edge(value)
            sideways = {"v": "<", "^": ">"}[marker]
            axes.plot(edge, row - 0.18, marker=sideways, color=style["color"], alpha=0.6, **BEYOND)
    centre, low, high = mean
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([low, high], [row + 0.14] * 2, color="black", linewidth=1.3, marker="|", markersize=6, zorder=3)
    if math.isfinite(centre) and scale.contains(centre):
        axes.plot(centre, row + 0.14, linestyle="", markersize=6, zorder=4, **style)


def _value_axis(axes: "Axes", name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name, parse_math=False)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.ticklabel_format(axis="x", useOffset=False)
