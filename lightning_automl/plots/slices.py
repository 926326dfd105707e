"""The values of trials against one parameter."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_automl.plots.dimensions import Dimension
from lightning_automl.plots.history import scatter
from lightning_automl.plots.marks import BEST, ValueScale
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def value_slice(
    dimension: Dimension,
    places: Sequence[float],
    values: Sequence[float],
    complete: Sequence[bool],
    *,
    maximize: bool,
    name: str,
) -> "Figure":
    """Draw what trials reached against the value of one parameter.

    Args:
        dimension: The parameter.
        places: Its value in each trial (see `Dimension`); trials without it are left out.
        values: Of the monitored metric; of a pruned trial its last one. Those not finite are left out.
        complete: False for pruned trials.
        maximize: Whether more is better.
        name: Of the metric.

    Returns:
        A small figure, to stand beside others. The points of one choice are spread sideways, by their order; values
        far from the best are triangles at the edge.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.85, 2.5), layout="constrained")
    axes = figure.subplots()
    rows = [
        (_spread(place, index) if dimension.choices else place, value, whole)
        for index, (place, value, whole) in enumerate(zip(places, values, complete, strict=True))
        if math.isfinite(place) and math.isfinite(value)
    ]
    done = [(place, value) for place, value, whole in rows if whole]
    # Of all trials, also those without the parameter, so that slices can be compared.
    every = [value for value, whole in zip(values, complete, strict=True) if whole]
    others = [value for value, whole in zip(values, complete, strict=True) if not whole]
    dimension.prepare(axes.xaxis)
    pruned = [(place, value) for place, value, whole in rows if not whole]
    scatter(axes, pruned, done, maximize, ValueScale.of(every, maximize, others))
    best = (max if maximize else min)((value for value in every if math.isfinite(value)), default=math.nan)
    if at := [point for point in done if point[1] == best]:
        axes.plot(*at[0], linestyle="", **BEST)
    axes.set_xlabel(shorten(dimension.name, 30), parse_math=False, fontsize=9)
    axes.set_ylabel(shorten(name), parse_math=False, fontsize=9)
    axes.tick_params(labelsize=8)
    if sum(len(str(choice)) + 2 for choice in dimension.choices) > 30:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.grid(alpha=0.3)
    return figure


def _spread(place: float, index: int) -> float:
    """Up to a quarter to either side: multiples of the golden ratio lie evenly, and are the same each time."""
    return place + 0.5 * ((index * 0.6180339887) % 1 - 0.5)
