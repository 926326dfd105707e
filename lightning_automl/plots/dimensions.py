"""The axis of a parameter in the figures of a study."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.axis import Axis

#: Characters of a choice's name.
LONGEST = 16


@dataclass(frozen=True)
class Dimension:
    """What a figure has to know of a parameter.

    Values are given to the figures as numbers: of a choice its position in ``choices``, NaN where a trial does not have
    the parameter.

    Attributes:
        name: Of the axis.
        low: The lower end, included; above 0 on a logarithmic scale.
        high: The upper end, included.
        log: Whether the scale is logarithmic.
        whole: Whether values are whole numbers.
        choices: Names of the choices; empty for a range.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: Sequence[str] = ()

    def shares(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Where values lie between the ends, in [0, 1]; the middle when the ends are equal, NaN for NaN."""
        given = np.asarray(values, float)
        low, high = (0.0, float(len(self.choices) - 1)) if self.choices else (self.low, self.high)
        if self.log:
            given, low, high = np.log(given), math.log(low), math.log(high)
        return np.where(np.isnan(given), np.nan, (given - low) / (high - low)) if high > low else given * 0 + 0.5

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Values with their names for an axis that has none of its own: all choices, or a few numbers of the range."""
        if self.choices:
            return [(float(place), shorten(str(name), LONGEST)) for place, name in enumerate(self.choices)]
        if self.low == self.high:
            return [(self.low, f"{self.low:.4g}")]
        if self.log:
            chosen = self._decades(most)
        else:
            from matplotlib.ticker import MaxNLocator

            found = MaxNLocator(most - 1, integer=self.whole).tick_values(self.low, self.high)
            inside = [float(value) for value in found if self.low <= value <= self.high]
            margin = 0.12 * (self.high - self.low)  # the ends themselves are always named
            inside = [value for value in inside if self.low + margin < value < self.high - margin]
            chosen = [self.low, *inside, self.high]
        return [(value, f"{value:.4g}") for value in chosen]

    def _decades(self, most: int) -> list[float]:
        low, high = math.log10(self.low), math.log10(self.high)
        every = max(1, math.ceil((high - low) / (most - 1)))
        margin = 0.12 * (high - low)
        inside = [k for k in range(math.ceil(low), math.floor(high) + 1, every) if low + margin < k < high - margin]
        return [self.low, *(10.0**k for k in inside), self.high]

    def prepare(self, axis: "Axis") -> None:
        """Give an axis the scale, the limits and the ticks of the parameter."""
        from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

        across = axis is axis.axes.xaxis
        set_scale = axis.axes.set_xscale if across else axis.axes.set_yscale
        set_limits = axis.axes.set_xlim if across else axis.axes.set_ylim
        if self.choices:
            places = range(len(self.choices))
            axis.set_major_locator(FixedLocator(list(places)))
            names = [shorten(str(name), LONGEST) for name in self.choices]
            axis.set_ticklabels(names, parse_math=False)
            set_limits((-0.5, len(self.choices) - 0.5))
            return
        if self.log:
            set_scale("log")
            margin = (self.high / self.low) ** 0.04 if self.high > self.low else 1.5
            set_limits((self.low / margin, self.high * margin))
            if self.high / self.low < 50:  # powers of ten alone would be one or none
                ticks = self.ticks()
                axis.set_major_locator(FixedLocator([value for value, _ in ticks]))
                axis.set_ticklabels([name for _, name in ticks])
                axis.set_minor_locator(NullLocator())
            return
        margin = 0.04 * (self.high - self.low) or 0.5
        set_limits((self.low - margin, self.high + margin))
        axis.set_major_locator(MaxNLocator(5, integer=self.whole))
