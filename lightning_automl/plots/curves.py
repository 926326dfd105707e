"""Learning curves of a run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: One colour a stage, distinct for colour-blind readers (Okabe and Ito).
COLOURS = {"train": "#0072B2", "val": "#D55E00", "arch": "#009E73"}
#: In print without colours the stages are told apart by these.
DASHES = {"train": "-", "val": "--", "arch": ":"}


def learning_curves(rows: Sequence[Mapping[str, float]], metrics: Sequence[str] = ("loss", "accuracy")) -> "Figure":
    """Draw metrics over epochs, one panel a metric and one line a stage.

    Args:
        rows: One mapping an epoch with ``epoch`` and values named ``{stage}_{metric}``; values may be missing.
        metrics: What to draw, by the name behind the stage.

    Returns:
        The figure; metrics that no row has are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = {
        metric: {
            stage: [(row["epoch"] + 1, row[f"{stage}_{metric}"]) for row in rows if f"{stage}_{metric}" in row]
            for stage in COLOURS
        }
        for metric in metrics
    }
    drawn = [metric for metric in metrics if any(lines[metric].values())]
    figure = Figure(figsize=(4.5 * max(len(drawn), 1), 3.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, max(len(drawn), 1), squeeze=False)[0], drawn, strict=False):
        for stage, points in lines[metric].items():
            if points:
                epochs, values = zip(*points, strict=True)
                style = {"color": COLOURS[stage], "linestyle": DASHES[stage]}
                axes.plot(epochs, values, label=stage, marker="o" if len(points) < 3 else None, **style)
        axes.set(title=metric.replace("_", " "), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure
