"""Confusion matrix of a classifier."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: With more classes the counts and names would not be readable, and only the colours are drawn.
READABLE = 25


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Draw how many images of each class were given to each class; the colour is the share of the row.

    Args:
        counts: ``(true, predicted)``.
        class_names: One name a row; long ones lose their middle.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    classes = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    readable = classes <= READABLE
    names = [shorten(name) for name in class_names]
    # Inches: the names need room of their own, or long ones would leave none for the matrix.
    side = max(2.0, 0.42 * classes) if readable else 5.5
    text = 0.075 * max(len(name) for name in names) if readable else 0.3
    figure = Figure(figsize=(1.1 * side + text + 1.3, side + 0.7 * text + 0.7), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.046)
    axes.set(xlabel="predicted class", ylabel="true class")
    if readable:
        # A dollar sign in a name is no formula.
        style: dict[str, Any] = {"fontsize": 9, "parse_math": False}
        axes.set_xticks(range(classes), labels=names, rotation=45, ha="right", rotation_mode="anchor", **style)
        axes.set_yticks(range(classes), labels=names, **style)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:d}", ha="center", va="center", fontsize=8, color=colour)
    return figure
