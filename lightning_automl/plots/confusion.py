"""Confusion matrix of a classifier."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: With more classes the counts and names would not be readable, and only the colours are drawn.
READABLE = 25


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Draw how many images of each class were given to each class; the colour is the share of the row.

    Args:
        counts: ``(true, predicted)``.
        class_names: One name a row.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    classes = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    readable = classes <= READABLE
    side = max(3.2, 0.42 * classes + 1.4) if readable else 7.0
    figure = Figure(figsize=(1.25 * side + 0.8, side + 0.4), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.046)
    axes.set(xlabel="predicted class", ylabel="true class")
    if readable:
        axes.set_xticks(range(classes), labels=list(class_names), rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), labels=list(class_names))
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:d}", ha="center", va="center", fontsize=8, color=colour)
    return figure
