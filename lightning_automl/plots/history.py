"""How the best value of a study grew."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.marks import BEST, BEYOND, COMPLETE, PRUNED, ValueScale, opacity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]


def best_so_far(values: Sequence[float], maximize: bool) -> list[float]:
    """The best of the values up to each one; NaN until there is one that is finite."""
    best, found = math.nan, []
    for value in values:
        if math.isfinite(value) and (math.isnan(best) or (value > best if maximize else value < best)):
            best = value
        found.append(best)
    return found


def optimisation_history(
    places: Sequence[float],
    values: Sequence[float],
    complete: Sequence[bool],
    *,
    maximize: bool,
    name: str,
    along: str = "trial",
) -> "Figure":
    """Draw the values of trials in the order of what had been spent, and the best one so far as a line.

    Args:
        places: Number of each trial, or epochs spent until its end, ascending.
        values: Of the monitored metric; of a pruned trial its last one.
        complete: False for pruned trials, whose values do not count as best.
        maximize: Whether more is better.
        name: Of the metric.
        along: What the places are.

    Returns:
        The figure. Values that are not finite are left out, those far from the best are triangles at its edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in zip(places, values, complete, strict=True) if math.isfinite(row[1])]
    pruned = [(place, value) for place, value, whole in rows if not whole]
    done = [(place, value) for place, value, whole in rows if whole]
    scatter(axes, pruned, done, maximize)
    if done:
        best = best_so_far([value for _, value in done], maximize)
        end = max(place for place, _, _ in rows)
        across, up = [*(place for place, _ in done), end], [*best, best[-1]]
        axes.step(across, up, where="post", color=COLOURS["val"], linewidth=1.8, label="best so far")
        axes.plot(*done[best.index(best[-1])], linestyle="", **BEST)
    axes.set_xlabel(along)
    axes.set_ylabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    if rows:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def scatter(
    axes: "Axes",
    pruned: Sequence[Point],
    complete: Sequence[Point],
    maximize: bool,
    scale: ValueScale | None = None,
) -> None:
    """Draw trials as points, with the upward axis of their values.

    Args:
        axes: To draw into.
        pruned: Places and finite values of pruned trials.
        complete: Those of complete ones.
        maximize: Whether more is better.
        scale: Of the values; chosen by them when left out. What lies beyond is drawn as a triangle at the edge.
    """
    if scale is None:
        scale = ValueScale.of([value for _, value in complete], maximize, [value for _, value in pruned])
    scale.apply(axes.yaxis)
    alpha = opacity(len(pruned) + len(complete))
    for points, label, style in ((pruned, "pruned", PRUNED), (complete, "complete", COMPLETE)):
        if points:
            inside = [point for point in points if scale.contains(point[1])] or [(math.nan, math.nan)]
            axes.plot(*zip(*inside, strict=True), linestyle="", label=label, alpha=alpha, **style)
        for place, value in points:
            if not scale.contains(value):
                edge, marker = scale.edge(value)
                colour = style["color"]
                axes.plot(place, edge, marker=marker, color=colour, alpha=alpha, **BEYOND)
