"""Figures with a row for each class: how well it is recognised, and how many images it has."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More rows would fill more than a page.
ROWS = 20
#: In print without colours the splits are told apart by their pattern.
SPLITS = {"train": (COLOURS["train"], ""), "val": (COLOURS["val"], "////"), "test": ("#F0E442", "....")}


def class_recall(
    class_names: Sequence[str],
    recall: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    counts: Sequence[int],
    rows: int = ROWS,
) -> "Figure":
    """Draw the recall of each class with its interval, and how many images it comes from.

    Args:
        class_names: One name a class.
        recall: In [0, 1], one a class; NaN for a class without images, which keeps its row.
        low: Lower ends of the intervals.
        high: Upper ends.
        counts: Images of each class.
        rows: Of more classes than these, only the worst are drawn, and the title says so.

    Returns:
        The figure.
    """
    chosen, title = _choose(np.asarray(recall, float), rows, "worst")
    names = [f"{shorten(class_names[index])}, n={counts[index]}" for index in chosen]
    figure, axes = _rows(names, title)
    for row, index in enumerate(chosen):
        if np.isfinite(recall[index]):
            axes.plot([low[index], high[index]], [row, row], color="black", linewidth=1.5, marker="|", markersize=7)
            axes.plot([recall[index]], [row], "o", color=COLOURS["val"], markeredgecolor="black", markersize=6)
    axes.set(xlabel="recall", xlim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    return figure


def class_counts(
    class_names: Sequence[str], counts_by_split: Mapping[str, Sequence[int]], rows: int = ROWS
) -> "Figure":
    """Draw how many images each class has, the splits one behind the other, with their numbers.

    Args:
        class_names: One name a class.
        counts_by_split: Images of each class, by the name of the split: ``train``, ``val``, ``test``.
        rows: Of more classes than these, only the smallest are drawn, and the title says so.

    Returns:
        The figure.
    """
    counts = {split: np.asarray(values, int) for split, values in counts_by_split.items()}
    total = np.sum(list(counts.values()), axis=0)
    chosen, title = _choose(total, rows, "smallest")
    figure, axes = _rows([shorten(class_names[index]) for index in chosen], title)
    start = np.zeros(len(chosen), int)
    for split, values in counts.items():
        colour, hatch = SPLITS.get(split, ("0.75", "xx"))
        axes.barh(
            range(len(chosen)),
            values[chosen],
            left=start,
            height=0.7,
            label=split,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
        )
        start += values[chosen]
    for row, index in enumerate(chosen):
        numbers = " + ".join(str(values[index]) for values in counts.values())
        axes.text(1.02, row, numbers, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_xlabel("images")
    figure.legend(loc="outside upper right", ncols=len(counts), frameon=False)
    return figure


def _choose(values: "np.ndarray", rows: int, word: str) -> tuple[list[int], str]:
    # In the order of the classes where all are drawn, else the lowest first; NaN is sorted behind all numbers.
    if len(values) <= rows:
        return list(range(len(values))), ""
    return np.argsort(values, kind="stable")[:rows].tolist(), f"the {rows} {word} of {len(values)} classes"


def _rows(names: Sequence[str], title: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 1.1 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    # A dollar sign in a name is no formula.
    axes.set_yticks(range(len(names)), labels=names, fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title, fontsize=10)
    return figure, axes
