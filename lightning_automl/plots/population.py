"""Population based training: how its members went, and the schedule that the best of them found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.dimensions import Dimension
from lightning_automl.plots.marks import ValueScale, opacity
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Segment:
    """A part of the training of a member.

    Attributes:
        points: Epochs and values, oldest first; the last of the segment before it comes first, if there is one.
        copied: Whether the weights were taken over from another member.
        winner: Whether the best weights of the study came from it.
    """

    points: Sequence[tuple[float, float]]
    copied: bool = False
    winner: bool = False


def population_history(segments: Sequence[Segment], *, maximize: bool, name: str) -> "Figure":
    """Draw the values of all members over the epochs, and those that led to the best weights thick.

    Args:
        segments: In any order.
        maximize: Whether more is better.
        name: Of the metric.

    Returns:
        The figure; where a member took over the weights of another one, the line is dashed and begins there.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    alpha = max(0.35, opacity(len(segments)))
    labelled: set[str] = set()
    for each in sorted(segments, key=lambda segment: segment.winner):
        label = "led to the best" if each.winner else "taken over from another" if each.copied else "goes on"
        colour = COLOURS["val"] if each.winner else COLOURS["train"]
        axes.plot(
            *zip(*each.points, strict=True),
            color=colour,
            linestyle="--" if each.copied else "-",
            linewidth=2.4 if each.winner else 1.1,
            alpha=1 if each.winner else alpha,
            label=None if label in labelled else label,
            marker="." if len(each.points) == 1 else None,
        )
        labelled.add(label)
    ValueScale.of([value for each in segments for _, value in each.points], maximize, shown=1).apply(axes.yaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if segments:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def value_schedule(dimension: Dimension, spans: Sequence[tuple[float, float, float]]) -> "Figure":
    """Draw the value of a parameter over the epochs of a training.

    Args:
        dimension: The parameter.
        spans: First and last epochs with the value that held between them (see `Dimension`), oldest first.

    Returns:
        A small figure, to stand beside others.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(2.85, 2.4), layout="constrained")
    axes = figure.subplots()
    dimension.prepare(axes.yaxis)
    across = [place for first, last, _ in spans for place in (first, last)]
    axes.plot(across, [value for *_, value in spans for _ in range(2)], color=COLOURS["val"], linewidth=2)
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_title(shorten(dimension.name, 30), parse_math=False, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return figure
