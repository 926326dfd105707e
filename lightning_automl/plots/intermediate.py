"""How trials went while they were trained."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.marks import HEAVY, ValueScale, opacity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OTHERS = "not ended"
#: In the order of drawing.
_STYLES: dict[str, dict[str, Any]] = {
    "pruned": {"color": "0.6", "linestyle": "--", "linewidth": 0.8},
    _OTHERS: {"color": "#CC79A7", "linestyle": ":", "linewidth": 1.2},
    "complete": {"color": COLOURS["train"], "linestyle": "-", "linewidth": 1.0},
}
_END: dict[str, Any] = {"marker": "x", "markersize": 4, "markeredgecolor": "0.35"}


def intermediate_values(
    curves: Sequence[Sequence[tuple[int, float]]],
    states: Sequence[str],
    *,
    maximize: bool,
    name: str,
    unit: str = "epoch",
    best: int | None = None,
) -> "Figure":
    """Draw the reports of each trial as a line; pruned ones are dashed and end in a cross.

    Args:
        curves: A trial each: steps and values; values that are not finite are left out.
        states: ``complete``, ``pruned``, or another word for a trial that failed or is running.
        maximize: Whether more is better.
        name: Of the metric.
        unit: What a step is.
        best: Place in ``curves`` of the best trial, drawn last and thick.

    Returns:
        The figure. Its upward axis leaves out one in twenty values, the worst, if they are far from all others.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    lines = [[(step, value) for step, value in curve if math.isfinite(value)] for curve in curves]
    drawn = [(line, state if state in _STYLES else _OTHERS) for line, state in zip(lines, states, strict=True)]
    alpha, heavy = opacity(len(lines)), sum(map(len, lines)) > HEAVY
    handles = []
    for kind, style in _STYLES.items():
        own = [line for at, (line, state) in enumerate(drawn) if line and at != best and state == kind]
        end = _END if kind == "pruned" else {"marker": "."}
        for line in own:
            marked = {**end, "markevery": [len(line) - 1]} if kind == "pruned" or len(line) == 1 else {}
            axes.plot(*zip(*line, strict=True), alpha=alpha, rasterized=heavy, **style, **marked)
        if own:
            shown = {**end, "markevery": [1]} if kind == "pruned" else {}
            handles.append(Line2D([0, 1], [0, 0], label=kind, **style, **shown))
    if best is not None and lines[best]:
        style = {"color": COLOURS["val"], "linewidth": 2.4}
        axes.plot(*zip(*lines[best], strict=True), marker="o" if len(lines[best]) < 3 else None, **style)
        handles.append(Line2D([0, 1], [0, 0], label="best", **style))
    peak = max if maximize else min
    complete = [peak(value for _, value in line) for line, state in drawn if line and state == "complete"]
    every = [value for line, _ in drawn for _, value in line]
    ValueScale.of(complete, maximize, every, shown=0.95).apply(axes.yaxis)
    axes.set_xlabel(unit)
    axes.set_ylabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure
