"""Reliability diagram: whether a classifier is right as often as it says."""

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ReliabilityTable(Protocol):
    """Images in bins of confidence, every field ``(bins,)``: what ``metrics.reliability`` returns."""

    @property
    def lower(self) -> NDArray[np.float64]:
        """Lower edges."""

    @property
    def upper(self) -> NDArray[np.float64]:
        """Upper edges."""

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Mean confidences."""

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Shares of right predictions."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Numbers of images."""


def reliability_diagram(table: ReliabilityTable) -> "Figure":
    """Draw accuracy against confidence, and below it how many images there are of each confidence.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599 (figure 1). A classifier that is as often right as it says lies on
    the dashed line, one that is too sure of itself below it.

    Args:
        table: Images in bins of confidence; empty bins are left out.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    filled = table.counts > 0
    lower, upper, counts = table.lower[filled], table.upper[filled], table.counts[filled]
    confidence, accuracy = table.confidence[filled], table.accuracy[filled]
    # In bins of equal mass one may be as thin as a line; it is drawn all the same.
    bars = {"x": lower, "width": np.maximum(upper - lower, 0.004), "align": "edge", "linewidth": 0.8}
    figure = Figure(figsize=(4.5, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.bar(height=accuracy, color="#B3D4E8", edgecolor="black", **bars)
    above.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="as often right as it says")
    dots = {"color": COLOURS["val"], "markeredgecolor": "black", "markersize": 6, "clip_on": False}
    above.plot(confidence, accuracy, "o", label="measured", zorder=3, **dots)
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
    above.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    below.bar(height=counts, color="0.75", edgecolor="black", **bars)
    below.set(xlabel="confidence", ylabel="images")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure
