"""Learning curves of trainings that differ in nothing but their seed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_automl.plots.curves import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAGES = ("train", "val")


def seed_curves(runs: Sequence[Sequence[Mapping[str, float]]], metric: str, title: str = "") -> "Figure":
    """Draw a metric over epochs, one thin line a seed and stage.

    Args:
        runs: For each seed one mapping an epoch, with ``epoch`` and values named ``{stage}_{metric}``; values may be
            missing.
        metric: What to draw, by the name behind the stage.
        title: Of the figure; the metric's name by default.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for stage in _STAGES:
        label = stage
        for rows in runs:
            points = [(row["epoch"] + 1, row[f"{stage}_{metric}"]) for row in rows if f"{stage}_{metric}" in row]
            if points:
                epochs, values = zip(*points, strict=True)
                marker = "o" if len(points) < 3 else None
                style: dict[str, Any] = {
                    "color": COLOURS[stage],
                    "linestyle": DASHES[stage],
                    "linewidth": 1.1,
                    "alpha": 0.8,
                }
                axes.plot(epochs, values, marker=marker, label=label, **style)
                label = f"_{stage}"  # one entry a stage
    axes.set(title=title or metric.replace("_", " "), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return figure
