"""Figures about augmentation policies: what they do to images, how they were found, and whether they help."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.history import best_so_far
from lightning_automl.plots.marks import BEYOND, COMPLETE, ValueScale, opacity
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Images beside each other: an original and six draws.
COLUMNS = 7
_CELL = 1.3  # inches
_LINE = 0.125  # inches of a line of a caption
_CAPTION = 20  # characters of a line
#: Rounds in their order; in print without colours they are told apart by their dashes.
_ROUNDS: tuple[tuple[str, Any], ...] = (
    ("#D55E00", "-"),
    ("#009E73", "--"),
    ("#CC79A7", "-."),
    ("#E69F00", (0, (5, 1, 1, 1, 1, 1))),
)
_MEAN: dict[str, Any] = {"marker": "o", "markersize": 6, "color": COLOURS["val"], "markeredgecolor": "black"}


@dataclass(frozen=True)
class ImageRow:
    """Images that belong together.

    Attributes:
        title: Above them, or "".
        images: uint8 ``(channels, height, width)``, each with its caption.
    """

    title: str
    images: Sequence[tuple[NDArray[np.uint8], str]]


def captioned_images(rows: Sequence[ImageRow], columns: int = COLUMNS) -> "Figure":
    """Draw rows of images with their captions; a long row goes on in the next lines.

    Args:
        rows: One below the other. Of many channels the first three are shown.
        columns: Images of a line.

    Returns:
        The figure, as high as its captions need.
    """
    from matplotlib.figure import Figure

    lines, above = [], []  # images with the lines of their captions, and inches above them
    for row in rows:
        for start in range(0, len(row.images), columns):
            cells = [
                (image, textwrap.wrap(caption, _CAPTION)) for image, caption in row.images[start : start + columns]
            ]
            lines.append((row.title if start == 0 else "", cells))
            above.append(0.06 if start else 0.34 if row.title else 0.14)
    below = [0.05 + _LINE * max(len(caption) for _, caption in cells) for _, cells in lines]
    width = _CELL * columns + 0.1
    height = sum(above) + sum(below) + (_CELL - 0.08) * len(lines) + 0.1
    figure = Figure(figsize=(width, max(height, 0.5)))
    top = height - 0.05
    side = _CELL - 0.08
    for (title, cells), over, under in zip(lines, above, below, strict=True):
        if title:
            place = (0.08 / width, (top - 0.07) / height)
            figure.text(*place, title, fontsize=10, va="top", parse_math=False)
        top -= over
        for column, (image, caption) in enumerate(cells):
            left = 0.05 + _CELL * column + 0.04
            axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
            _show(axes, image)
            place = ((left + side / 2) / width, (top - side - 0.03) / height)
            figure.text(*place, "\n".join(caption), fontsize=7.5, ha="center", va="top", parse_math=False)
        top -= side + under
    return figure


def _show(axes: "Axes", image: NDArray[np.uint8]) -> None:
    pixels = image[:3].transpose(1, 2, 0) if len(image) >= 3 else image[0]
    axes.imshow(
        pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if max(pixels.shape) <= 64 else "antialiased"
    )
    axes.set_axis_off()


def acceptance_values(
    names: Sequence[str],
    values: Sequence[Sequence[tuple[int, float]]],
    means: Sequence[tuple[float, float, float]],
    *,
    metric: str,
    maximize: bool,
) -> "Figure":
    """Draw what each way of augmenting has reached on the held-out folds, a row for each.

    Args:
        names: Of the ways.
        values: For each, fold and value of every run; values that are not finite are left out.
        means: For each, mean with the lower and the upper end of its interval; NaN where there is none.
        metric: What the values are.
        maximize: Whether more is better.

    Returns:
        The figure; each fold has a shape of its own.
    """
    from matplotlib.lines import Line2D

    figure, axes = _rows(names)
    folds = sorted({fold for own in values for fold, _ in own})
    shapes = dict(zip(folds, "osD^vP*X" * (len(folds) // 8 + 1), strict=False))
    for row, (own, (mean, low, high)) in enumerate(zip(values, means, strict=True)):
        for fold, value in own:
            if math.isfinite(value):
                style: dict[str, Any] = {"markersize": 4, "color": COLOURS["train"], "alpha": 0.8, "markeredgewidth": 0}
                axes.plot(value, row - 0.2, shapes[fold], **style)
        _interval(axes, row + 0.12, mean, low, high)
    _value_axis(axes, f"{metric} ({'more' if maximize else 'less'} is better)")
    handles = [
        Line2D([], [], marker=shape, linestyle="", color=COLOURS["train"], markersize=4, label=f"fold {fold}")
        for fold, shape in shapes.items()
    ]
    known = any(math.isfinite(low) for _, low, _ in means)
    handles.append(Line2D([], [], linestyle="", label=f"mean{', 95 % interval' * known}", **_MEAN))
    if values:
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def paired_differences(
    names: Sequence[str], differences: Sequence[tuple[float, float, float]], *, metric: str, maximize: bool
) -> "Figure":
    """Draw by how much the searched policy differs from each simple way, beside the line of no difference.

    Args:
        names: Of the simple ways.
        differences: For each the mean difference, and the ends of its interval; NaN where there is none.
        metric: What was compared.
        maximize: Whether more is better.

    Returns:
        The figure.
    """
    figure, axes = _rows([f"minus {name}" for name in names])
    axes.axvline(0, color="0.4", linewidth=1, linestyle="--")
    for row, (mean, low, high) in enumerate(differences):
        _interval(axes, row, mean, low, high)
    _value_axis(axes, f"difference of {metric}")
    better = "more is better" if maximize else "less is better"
    axes.set_title(f"searched policy ({better})", fontsize=10)
    return figure


def _rows(names: Sequence[str]) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 1.3 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), labels=[shorten(name) for name in names], fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    return figure, axes


def _interval(axes: "Axes", row: float, mean: float, low: float, high: float) -> None:
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([low, high], [row, row], color="black", linewidth=1.5, marker="|", markersize=7)
    if math.isfinite(mean):
        axes.plot(mean, row, **_MEAN)


def _value_axis(axes: "Axes", name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.margins(x=0.08)


@dataclass(frozen=True)
class KeptOperation:
    """How often a search has kept an operation, and how strong.

    Attributes:
        name: Of the operation.
        count: Steps of the policy that are it.
        probability: Mean of these steps, in [0, 1]; NaN for none.
        magnitude: Likewise, 1 the strongest that is allowed; NaN for none, or where it does not count.
    """

    name: str
    count: int
    probability: float
    magnitude: float


def operations_kept(operations: Sequence[KeptOperation]) -> "Figure":
    """Draw how often each operation was kept, and beside it the means of its probability and its magnitude.

    Args:
        operations: Those that were searched, in the order of the picture.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 1.3 + 0.24 * max(len(operations), 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.1])
    rows = range(len(operations))
    counts = [each.count for each in operations]
    left.barh(rows, counts, height=0.7, color=COLOURS["train"], edgecolor="black", linewidth=0.6)
    for row, count in zip(rows, counts, strict=True):
        left.text(count, row, f" {count}", va="center", fontsize=7.5)
    left.set_xlim(0, 1.2 * max([*counts, 1]))
    left.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    left.set_xlabel("steps of the policy")
    left.set_yticks(rows, labels=[each.name for each in operations], fontsize=9, parse_math=False)
    left.set_ylim(len(operations) - 0.4, -0.6)
    marks: tuple[tuple[str, dict[str, Any]], ...] = (
        ("probability", {"marker": "o", "color": COLOURS["val"]}),
        ("magnitude", {"marker": "D", "color": COLOURS["arch"]}),
    )
    for name, style in marks:
        means = [getattr(each, name) for each in operations]
        right.plot(means, rows, linestyle="", markersize=5, markeredgecolor="black", label=name, **style)
    right.set(xlabel="mean of these steps", xlim=(-0.04, 1.04), xticks=[0, 0.5, 1])
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    right.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def density_history(title: str, rounds: Mapping[int, Sequence[float]], clean: float | None, *, name: str) -> "Figure":
    """Draw how the best policy of a fold became better, trial by trial, beside the value of unchanged images.

    Args:
        title: Of the picture.
        rounds: The values of each round, in the order of its trials; less is better. What is not finite has failed and
            is left out.
        clean: The value of unchanged images, or None.
        name: What the values are.

    Returns:
        The figure. Values far from the best are triangles at its edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(2.9, 3.1), layout="constrained")
    axes = figure.subplots()
    every = [value for values in rounds.values() for value in values if math.isfinite(value)]
    scale = ValueScale.of([*every, *([clean] if clean is not None else [])], False)
    scale.apply(axes.yaxis)
    alpha = 0.5 * opacity(len(every))
    for place, (number, values) in enumerate(sorted(rounds.items())):
        colour, dashes = _ROUNDS[place % len(_ROUNDS)]
        points = [(trial + 1, value) for trial, value in enumerate(values) if math.isfinite(value)]
        for trial, value in points:
            style = {**COMPLETE, "markersize": 3, "color": colour, "alpha": alpha}
            if scale.contains(value):
                axes.plot(trial, value, **style)
            else:
                edge, marker = scale.edge(value)
                axes.plot(trial, edge, **{**BEYOND, "marker": marker, "markersize": 3, "color": colour, "alpha": alpha})
        if points:
            best = best_so_far([value for _, value in points], False)
            across = [*(trial for trial, _ in points), len(values)]
            label = f"best, round {number + 1}"
            style = {"linestyle": dashes, "color": colour, "linewidth": 1.8}
            axes.step(across, [*best, best[-1]], where="post", label=label, **style)
    if clean is not None and math.isfinite(clean):
        axes.axhline(clean, color="black", linewidth=1.5, linestyle=":", label="unchanged images")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("trial")
    axes.set_ylabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.3)
    if every or clean is not None:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7.5)
    return figure
