"""What can be had for what: two objectives of a study."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.marks import BEST, COMPLETE, ValueScale, opacity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: With more points on the front their numbers would overlap.
NUMBERED = 12


def pareto_front(
    numbers: Sequence[int],
    points: Sequence[tuple[float, float]],
    front: Collection[int],
    *,
    names: tuple[str, str],
    maximize: tuple[bool, bool],
    joined: bool = True,
) -> "Figure":
    """Draw two objectives against each other, with the trials that no other one surpasses in both.

    Args:
        numbers: Of the trials.
        points: Their values, finite; the first is drawn upwards, the second to the right.
        front: Numbers of those on the front; they are named in the picture unless they are many.
        names: Of the two objectives.
        maximize: Whether more is better, of each.
        joined: Whether to draw the border of what is surpassed; not for two of three objectives, where the front is
            no line.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axes = figure.subplots()
    rest = [(x, y) for number, (y, x) in zip(numbers, points, strict=True) if number not in front]
    best = sorted((x, y, number) for number, (y, x) in zip(numbers, points, strict=True) if number in front)
    for at, axis in enumerate((axes.yaxis, axes.xaxis)):
        ValueScale.of([point[at] for point in points], maximize[at], shown=1, margin=0.09).apply(axis)
    if rest:
        axes.plot(*zip(*rest, strict=True), linestyle="", label="surpassed", alpha=opacity(len(rest)), **COMPLETE)
    if best:
        x, y, _ = zip(*best, strict=True)
        if joined and len(best) > 1:
            # To the corner that both have been surpassed in: right and down where little cost and much value is good.
            where = "post" if not maximize[1] else "pre"
            axes.step(x, y, where=where, color=COLOURS["val"], linewidth=1.2)  # type: ignore[arg-type]
        axes.plot(x, y, linestyle="", label="Pareto front", **{**BEST, "markersize": 6.5})
        if len(best) <= NUMBERED:
            # On the side where nothing is: what lies there would be better in both.
            shift = {"xytext": (5 if maximize[1] else -5, 4 if maximize[0] else -4), "textcoords": "offset points"}
            side = {"ha": "left" if maximize[1] else "right", "va": "bottom" if maximize[0] else "top"}
            for across, up, number in best:
                axes.annotate(str(number), (across, up), fontsize=8, **shift, **side)  # type: ignore[arg-type]
    better = ["more is better" if each else "less is better" for each in maximize]
    axes.set_ylabel(f"{names[0]} ({better[0]})", parse_math=False)
    axes.set_xlabel(f"{names[1]} ({better[1]})", parse_math=False)
    axes.grid(alpha=0.3)
    if points:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure
