"""Policies without a search: RandAugment and TrivialAugment."""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_automl.augment.engine import Plan
from lightning_automl.augment.ops import BASE, OPS
from lightning_automl.augment.policy import PLACES, ImagePolicy, plan_of, uniform
from lightning_automl.augment.spaces import OperationSpace
from lightning_automl.rundir import UserError

#: The 14 operations of both papers: AutoAugment's with the identity and without invert, cutout and sample pairing.
FOURTEEN = tuple(name for name, operation in OPS.items() if operation.wide is not None)

#: What AutoAugment has and they left out.
_LEFT_OUT = ("invert", "cutout", "sample_pairing")


def drawn_from(space: OperationSpace | None) -> tuple[str, ...]:
    """The operations that the random policies draw from.

    Without a space the papers' 14. With one, those of the 14 that it allows, and what it allows beyond AutoAugment's
    set; never what ``base_augment`` does already, nor what the papers left out of AutoAugment's set.
    """
    if space is None:
        return FOURTEEN
    return tuple(name for name in OPS if space.allows(name) and name not in (*_LEFT_OUT, *BASE))


class _RandomPolicy(ImagePolicy):
    """Draws operations uniformly, and does what it drew."""

    def __init__(
        self,
        space: str | dict[str, Any] | OperationSpace | None,
        bins: int,
        interpolation: Literal["nearest", "bilinear"],
        fill: float | list[float] | None,
    ) -> None:
        super().__init__(space, interpolation, fill)
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
            raise UserError(f"bins is {bins!r}; give a whole number of magnitudes, at least 2")
        self.bins = bins
        #: The operations drawn from, each with the same probability.
        self.drawn = drawn_from(self.space)
        caps = [self.cap(name) or 0.0 for name in self.drawn]
        self._places: NDArray[np.int64] = np.array([PLACES[name] for name in self.drawn])
        self._mirrored: NDArray[np.float64] = np.array([0.5 * OPS[name].signed for name in self.drawn])
        # strengths by (operation, bin)
        self._strengths: NDArray[np.float64] = np.array(caps)[:, None] * np.linspace(0, 1, bins)

    def cap(self, name: str) -> float | None:
        """The strength at the last bin; None if the operation has none."""
        return OPS[name].strongest if self.space is None else self.space.cap(name)

    def arguments(self) -> dict[str, Any]:
        """See :meth:`ImagePolicy.arguments`."""
        return {"bins": self.bins, **self._common()}


class TrivialAugment(_RandomPolicy):
    """One operation, drawn uniformly, at a magnitude drawn uniformly from 31; nothing to tune.

    Müller and Hutter, *TrivialAugment*, ICCV 2021, https://arxiv.org/abs/2103.10158 (algorithm 1; table 1: wide).

    Args:
        space: Without one, the paper's 14 operations in its wide ranges (as torchvision's ``TrivialAugmentWide``):
            translations go up to 32 pixels, whatever the size of the image, and images are turned by up to 135 degrees
            and inverted: give medical images a space. With one, the operations that it allows in its ranges
            (:func:`drawn_from`). See :class:`ImagePolicy`.
        bins: Number of magnitudes, from the identity to the strongest in equal steps.
        interpolation: As :class:`ImagePolicy`.
        fill: As :class:`ImagePolicy`.
    """

    def __init__(
        self,
        space: str | dict[str, Any] | OperationSpace | None = None,
        bins: int = 31,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | list[float] | None = None,
    ) -> None:
        super().__init__(space, bins, interpolation, fill)
        wide = self.space is None
        self._by_width: NDArray[np.bool_] = np.array([wide and name == "translate_x" for name in self.drawn])
        self._by_height: NDArray[np.bool_] = np.array([wide and name == "translate_y" for name in self.drawn])

    def cap(self, name: str) -> float | None:
        """The strength at the last bin; without a space translations are in pixels."""
        if self.space is None:
            return None if OPS[name].strongest is None else OPS[name].wide
        return self.space.cap(name)

    def draw(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Plan:
        """For each image an operation, its magnitude and its sign; see :meth:`ImagePolicy.draw`."""
        drawn = uniform(count, 4, generator)
        chosen = (drawn[:, 0] * len(self.drawn)).astype(np.int64)
        bins = (drawn[:, 1] * self.bins).astype(np.int64)
        strengths = self._strengths
        if self.space is None:
            height, width = (max(1, pixels) for pixels in size)
            strengths = strengths / np.where(self._by_width, width, np.where(self._by_height, height, 1))[:, None]
        strength = strengths[chosen, bins]
        strength = np.where(drawn[:, 2] < self._mirrored[chosen], -strength, strength)
        return plan_of(self._places[chosen][:, None], strength[:, None], drawn[:, 3:])

    def strongest(self) -> dict[str, float | None]:
        """See :meth:`ImagePolicy.strongest`; wide translations count as the whole image, since sizes are not known."""
        pixels = ("translate_x", "translate_y") if self.space is None else ()
        return {name: 1.0 if name in pixels else self.cap(name) for name in self.drawn}


class RandAugment(_RandomPolicy):
    """Some operations one after the other, drawn uniformly with replacement, all at the same magnitude.

    Cubuk et al., *RandAugment*, 2020, https://arxiv.org/abs/1909.13719 (figure 2). Defaults and meaning of the
    magnitude are torchvision's.

    Args:
        num_ops: How many operations, at least 1.
        magnitude: Number of the bin, in [0, bins); 0 is the identity for what has a strength.
        space: Without one, the paper's 14 operations in AutoAugment's ranges. With one, the operations that it allows
            in its ranges (:func:`drawn_from`). See :class:`ImagePolicy`.
        bins: Number of magnitudes, from the identity to the strongest in equal steps.
        interpolation: As :class:`ImagePolicy`.
        fill: As :class:`ImagePolicy`.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        space: str | dict[str, Any] | OperationSpace | None = None,
        bins: int = 31,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | list[float] | None = None,
    ) -> None:
        super().__init__(space, bins, interpolation, fill)
        if isinstance(num_ops, bool) or not isinstance(num_ops, int) or num_ops < 1:
            raise UserError(f"num_ops is {num_ops!r}; give a whole number, at least 1 (Identity() does nothing)")
        if isinstance(magnitude, bool) or not isinstance(magnitude, int) or not 0 <= magnitude < bins:
            raise UserError(f"magnitude is {magnitude!r}; with {bins} bins give a whole number from 0 to {bins - 1}")
        self.num_ops = num_ops
        self.magnitude = magnitude

    def draw(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Plan:
        """For each image operations and their signs; see :meth:`ImagePolicy.draw`."""
        drawn = uniform(count, 3 * self.num_ops, generator)
        chosen = (drawn[:, : self.num_ops] * len(self.drawn)).astype(np.int64)
        strength = self._strengths[chosen, self.magnitude]
        signs = drawn[:, self.num_ops : 2 * self.num_ops]
        strength = np.where(signs < self._mirrored[chosen], -strength, strength)
        return plan_of(self._places[chosen], strength, drawn[:, 2 * self.num_ops :])

    def strongest(self) -> dict[str, float | None]:
        """See :meth:`ImagePolicy.strongest`."""
        share = self.magnitude / (self.bins - 1)
        caps = {name: self.cap(name) for name in self.drawn}
        return {name: None if cap is None else cap * share for name, cap in caps.items()}

    def arguments(self) -> dict[str, Any]:
        """See :meth:`ImagePolicy.arguments`."""
        return {"num_ops": self.num_ops, "magnitude": self.magnitude, **super().arguments()}
