"""Leaderboard: what each arm has reached, the chosen one marked, those that were not run named."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.marks import BEST, ValueScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More rows would fill more than a page.
ROWS = 20
_NAME = 24  # characters of a line of a name
_NOTE = 44  # characters of a line of what stands in place of a value
_LINES = 2
_PALE = "0.6"


@dataclass(frozen=True)
class Standing:
    """A row of a leaderboard.

    Attributes:
        name: Of the arm.
        mean: Over folds, or NaN.
        low: Lower end of its interval, or NaN.
        high: Upper end, or NaN.
        values: Of the single folds.
        chosen: Whether it is the chosen one.
        pruned: Whether it was stopped early.
        note: What is said in place of a value, as ``not run: why``; only shown without a mean.
    """

    name: str
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    values: Sequence[float] = ()
    chosen: bool = False
    pruned: bool = False
    note: str = ""


def leaderboard(standings: Sequence[Standing], *, metric: str, maximize: bool, mark: str = "chosen") -> "Figure":
    """Draw the mean of each arm with its interval and the values of its folds, one row below the other.

    Args:
        standings: The rows in their order; of more than `ROWS` the first ones are drawn, and the title says so.
        metric: What the values are.
        maximize: Whether more is better.
        mark: What the chosen one is called.

    Returns:
        The figure. Intervals that go on beyond it end in a triangle at its edge.
    """
    from matplotlib.figure import Figure

    drawn = standings[:ROWS]
    names = [_wrapped(each.name, _NAME) for each in drawn]
    lines = sum(
        max(name.count("\n"), _wrapped(each.note, _NOTE).count("\n")) for name, each in zip(names, drawn, strict=True)
    )
    figure = Figure(figsize=(5.0, 1.3 + 0.36 * max(len(drawn), 1) + 0.1 * lines), layout="constrained")
    axes = figure.subplots()
    known = [value for each in drawn for value in (each.mean, *each.values)]
    scale = _scale(drawn, maximize)
    for row, each in enumerate(drawn):
        _row(axes, row, each, scale)
    # A dollar sign in a name is no formula.
    axes.set_yticks(range(len(drawn)), labels=names, fontsize=8.5, parse_math=False)
    axes.set_ylim(max(len(drawn), 1) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    if any(map(math.isfinite, known)):
        from matplotlib.ticker import MaxNLocator

        scale.apply(axes.xaxis)
        if not scale.log:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(f"{metric} ({'more' if maximize else 'less'} is better)", parse_math=False)
        _legend(figure, drawn, mark)
    else:
        axes.set(xticks=[], xlim=(0, 1))
    if len(standings) > ROWS:
        axes.set_title(f"the first {ROWS} of {len(standings)}", fontsize=10)
    return figure


def _scale(drawn: Sequence[Standing], maximize: bool) -> ValueScale:
    """All means, single values, and intervals as far as they do not press these together."""
    means = [each.mean for each in drawn if math.isfinite(each.mean)]
    values = [value for each in drawn for value in (each.mean, *each.values) if math.isfinite(value)]
    if not values:
        return ValueScale(0.0, 1.0)
    reach = 0.4 * (max(values) - min(values)) or 0.01
    ends = [end for each in drawn for end in (each.low, each.high) if math.isfinite(end)]
    near = [min(max(end, min(values) - reach), max(values) + reach) for end in ends]
    if max(values) <= 1 and min(values) >= 0:  # no share lies beyond its ends
        near = [min(max(end, 0.0), 1.0) for end in near]
    return ValueScale.of(means, maximize, [*values, *near])


def _row(axes: "Axes", row: int, each: Standing, scale: ValueScale) -> None:
    if each.chosen:
        axes.axhspan(row - 0.45, row + 0.45, color="#FFF3D6", zorder=0)
    if not math.isfinite(each.mean):
        note = _wrapped(each.note, _NOTE)
        style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "color": "0.35"}
        axes.text(0.02, row, note, fontsize=7.5, style="italic", parse_math=False, **style)
        return
    colour = _PALE if each.pruned else "black"
    for value in each.values:
        if math.isfinite(value) and scale.contains(value):
            mark = _PALE if each.pruned else COLOURS["train"]
            axes.plot(value, row - 0.22, "o", markersize=3.5, color=mark, alpha=0.8, markeredgewidth=0)
    if math.isfinite(each.low) and math.isfinite(each.high):
        low, high = max(each.low, scale.low), min(each.high, scale.high)
        if low <= high:
            axes.plot([low, high], [row, row], color=colour, linewidth=1.5)
        for end, marker in ((each.low, "<"), (each.high, ">")):
            inside = scale.contains(end)
            place = end if inside else scale.low if end < scale.low else scale.high
            axes.plot(place, row, "|" if inside else marker, color=colour, markersize=7 if inside else 4, clip_on=False)
    if scale.contains(each.mean):
        axes.plot(each.mean, row, **_style(each))
    else:
        place, _ = scale.edge(each.mean)
        axes.plot(place, row, "<" if each.mean < scale.low else ">", color=colour, markersize=5)


def _style(each: Standing) -> dict[str, Any]:
    if each.chosen:
        return BEST
    if each.pruned:
        return {"marker": "o", "markersize": 5, "color": "white", "markeredgecolor": _PALE}
    return {"marker": "o", "markersize": 6, "color": COLOURS["train"], "markeredgecolor": "black"}


def _legend(figure: "Figure", drawn: Sequence[Standing], mark: str) -> None:
    from matplotlib.lines import Line2D

    kinds = {
        mark: next((each for each in drawn if each.chosen), None),
        "mean, 95 % interval": Standing(""),
        "stopped early": next((each for each in drawn if each.pruned and not each.chosen), None),
    }
    handles = [Line2D([], [], linestyle="", label=name, **_style(each)) for name, each in kinds.items() if each]
    if any(each.values for each in drawn):
        style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "color": COLOURS["train"]}
        handles.append(Line2D([], [], linestyle="", label="one fold", **style))
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(text, width)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][: width - 2].rstrip() + " …"]
    return "\n".join(lines)
