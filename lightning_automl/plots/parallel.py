"""All values of many trials in one picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.dimensions import Dimension
from lightning_automl.plots.marks import HEAVY, ValueScale, opacity
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Where a line goes for a parameter that its trial does not have, left of the axis.
ABSENT = -0.16


def parallel_coordinates(
    dimensions: Sequence[Dimension],
    rows: Sequence[Sequence[float]],
    values: Sequence[float],
    *,
    maximize: bool,
    name: str,
) -> "Figure":
    """Draw each trial as a line through its values, coloured by what it reached, the best one in a colour of its own.

    Inselberg, *The plane with parallel coordinates*, 1985; turned, so that the axes lie one below the other and their
    names have room on a narrow screen. A parameter that a trial does not have is crossed at the left, beside the axis.

    Args:
        dimensions: The parameters, from top to bottom.
        rows: A trial each, one number a dimension (see `Dimension`).
        values: What each trial reached, finite.
        maximize: Whether more is better.
        name: Of the metric, whose axis is the topmost.

    Returns:
        The figure. Values far from the best lie at the end of the metric's axis.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    given = np.asarray(values, float)
    count = len(dimensions)
    scale = ValueScale.of(values, maximize)
    shares = np.column_stack(
        [
            scale.shares(values),
            *(each.shares([row[at] for row in rows]) for at, each in enumerate(dimensions)),
        ]
    )
    shares = np.where(np.isnan(shares), ABSENT, shares)
    places = np.arange(count + 1)
    # The best are drawn last, above the others.
    order = np.argsort(given if maximize else -given, kind="stable")
    goodness = shares[:, 0] if maximize else 1 - shares[:, 0]

    figure = Figure(figsize=(5.4, 0.9 + 0.62 * (count + 1)), layout="constrained")
    axes = figure.subplots()
    lines = LineCollection(
        [np.column_stack([shares[at], places]) for at in order[:-1]],
        array=goodness[order[:-1]],
        cmap="cividis_r",
        clim=(0, 1),
        linewidths=1.0,
        alpha=opacity(len(rows)),
        rasterized=len(rows) * (count + 1) > HEAVY,
    )
    axes.add_collection(lines)
    if len(order):
        style: dict[str, Any] = {"color": COLOURS["val"], "linewidth": 2.2, "marker": "o", "markersize": 4, "zorder": 4}
        axes.plot(shares[order[-1]], places, label="best", **style)
    text: dict[str, Any] = {"fontsize": 7.5, "ha": "center", "va": "top", "zorder": 5}
    background: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for place, each in enumerate([None, *dimensions]):
        axes.plot([0, 1], [place, place], color="black", linewidth=0.9, zorder=3)
        ticks = _value_ticks(scale) if each is None else each.ticks(4)
        at = (scale if each is None else each).shares([value for value, _ in ticks])
        for share, label in zip(at, _thinned([label for _, label in ticks]), strict=True):
            axes.plot([share, share], [place - 0.06, place + 0.06], color="black", linewidth=0.9, zorder=3)
            if label:
                axes.text(share, place + 0.1, label, parse_math=False, bbox=background, **text)
        if np.isclose(shares[:, place], ABSENT).any():
            axes.text(ABSENT, place + 0.1, "absent", bbox=background, **text)
    # A dollar sign in a name is no formula.
    labels = [shorten(name), *(shorten(each.name) for each in dimensions)]
    axes.set_yticks(places, labels=labels, fontsize=9, parse_math=False)
    axes.set(xlim=(min(ABSENT, shares.min(initial=0)) - 0.06, 1.06), ylim=(count + 0.45, -0.3), xticks=[])
    axes.tick_params(left=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(lines, ax=axes, orientation="horizontal", fraction=0.04, aspect=40, pad=0.01)
    bar.set_ticks([0, 1], labels=["worse", "better"], fontsize=8)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    return figure


def _value_ticks(scale: ValueScale) -> list[tuple[float, str]]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(numticks=5) if scale.log else MaxNLocator(4)
    found = [float(value) for value in locator.tick_values(scale.low, scale.high) if scale.contains(value)]
    if scale.log or len(found) < 2:
        return [(value, f"{value:.4g}") for value in found]
    digits = max(0, math.ceil(-math.log10(found[1] - found[0]) - 1e-9))
    return [(value, f"{value:,.{min(digits, 6)}f}") for value in found]


def _thinned(labels: Sequence[str], room: int = 60) -> list[str]:
    """Leave out labels, evenly, until the rest stands side by side without touching; ``room`` is in characters."""
    every = 1
    while sum(len(label) + 2 for label in labels[::every]) > room and every < len(labels):
        every += 1
    return [label if index % every == 0 else "" for index, label in enumerate(labels)]
