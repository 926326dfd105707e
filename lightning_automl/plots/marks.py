"""What the figures of a study share: the marks of trials by their state, and the axis of their values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.axis import Axis

#: Told apart by shape and by colour, for colour-blind readers and in print (Okabe and Ito).
COMPLETE: dict[str, Any] = {"marker": "o", "markersize": 4.5, "color": COLOURS["train"], "markeredgewidth": 0}
PRUNED: dict[str, Any] = {"marker": "x", "markersize": 4, "color": "0.55", "markeredgewidth": 1}
BEST: dict[str, Any] = {"marker": "o", "markersize": 8, "color": COLOURS["val"], "markeredgecolor": "black"}
#: Values beyond the picture, at its edge.
BEYOND: dict[str, Any] = {"markersize": 4.5, "linestyle": "", "markeredgewidth": 0}
#: More points or lines than these would hide each other when they are opaque.
CROWDED = 60
#: More points than these make a drawing of shapes larger than a picture of dots.
HEAVY = 20_000
#: Values above 0, some above 1, that differ by more than this factor are drawn on a logarithmic scale.
FACTOR = 30


def opacity(number: int) -> float:
    """Of so many marks, in (0, 1]."""
    return 1.0 if number <= CROWDED else max(0.2, (CROWDED / number) ** 0.5)


@dataclass(frozen=True)
class ValueScale:
    """The part of an axis of values in which the good ones can be told apart.

    Attributes:
        low: The lower end.
        high: The upper end.
        log: Whether it is logarithmic, as for losses and numbers of parameters that differ by decades.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        maximize: bool,
        others: Sequence[float] = (),
        *,
        shown: float = 0.25,
        margin: float = 0.05,
    ) -> Self:
        """Choose it.

        A diverged loss of a million would press all others into a line. The far end is left out where it is farther
        from the best value than three times the middle one is.

        Args:
            values: Those that have to be told apart; what is not finite does not count.
            maximize: Whether more is better.
            others: Those that may lie beyond the picture, as pruned trials do.
            shown: Share in [0, 1] of all values, the better ones, that is in the picture in any case.
            margin: Left free at both ends, as a share of what is shown.
        """
        main, every = _finite(values), _finite([*values, *others])
        if not len(every):
            return cls(0.0, 1.0)
        log = bool(every.min() > 0 and every.max() > 1 and every.max() / every.min() > FACTOR)
        sign = 1 if maximize else -1
        main, every = (sign * (np.log10(each) if log else each) for each in (main, every))  # more is better now
        best, end = every.max(), every.min()
        middle = np.median(main if len(main) else every)
        far = min(best + 3 * (middle - best), np.quantile(every, 1 - shown))
        end = max(end, far) if far < best else end
        free = margin * (best - end) or margin * abs(best) or margin
        low, high = sorted((sign * (end - free), sign * (best + free)))
        return cls(float(10**low), float(10**high), True) if log else cls(float(low), float(high))

    def apply(self, axis: "Axis") -> None:
        """Give an axis the scale, the limits and ticks that can be read."""
        from matplotlib.ticker import EngFormatter, FuncFormatter

        across = axis is axis.axes.xaxis
        if self.log:
            (axis.axes.set_xscale if across else axis.axes.set_yscale)("log")
        (axis.axes.set_xlim if across else axis.axes.set_ylim)((self.low, self.high))
        if self.high >= 10_000:
            axis.set_major_formatter(EngFormatter(sep=" "))
            axis.set_minor_formatter(FuncFormatter(lambda value, place: ""))

    def shares(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Where values lie between the ends, in [0, 1]; what lies beyond is at an end."""
        given, low, high = np.asarray(values, float), self.low, self.high
        if self.log:
            given, low, high = np.log(given), math.log(low), math.log(high)
        shares: NDArray[np.float64] = np.clip((given - low) / (high - low), 0, 1)
        return shares

    def contains(self, value: float) -> bool:
        """Whether a value is in the picture."""
        return self.low <= value <= self.high

    def edge(self, value: float) -> tuple[float, str]:
        """Where a value beyond the picture is drawn instead, with the marker that points to it."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = low + (0.02 if value < self.low else 0.98) * (high - low)
        return math.exp(place) if self.log else place, "v" if value < self.low else "^"


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray([value for value in values if math.isfinite(value)], np.float64)
