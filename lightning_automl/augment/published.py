"""AutoAugment's published policies."""

from typing import Any, Literal

from lightning_automl.augment.ops import OPS
from lightning_automl.augment.policy import Policy, Step, check_space
from lightning_automl.augment.spaces import OperationSpace, load_space
from lightning_automl.rundir import UserError

#: A line a sub-policy: operation, probability, and number of the magnitude in [0, 9], the steps of the discrete
#: search. Cubuk et al., *AutoAugment*, 2019, https://arxiv.org/abs/1805.09501 (tables 7, 8 and 9). As in torchvision,
#: the number counts away from the identity, in both directions where the operation has two, and is left out where
#: there is no strength.
_TABLES = {
    "cifar10": """
        invert 0.1 -, contrast 0.2 6
        rotate 0.7 2, translate_x 0.3 9
        sharpness 0.8 1, sharpness 0.9 3
        shear_y 0.5 8, translate_y 0.7 9
        autocontrast 0.5 -, equalize 0.9 -
        shear_y 0.2 7, posterize 0.3 7
        color 0.4 3, brightness 0.6 7
        sharpness 0.3 9, brightness 0.7 9
        equalize 0.6 -, equalize 0.5 -
        contrast 0.6 7, sharpness 0.6 5
        color 0.7 7, translate_x 0.5 8
        equalize 0.3 -, autocontrast 0.4 -
        translate_y 0.4 3, sharpness 0.2 6
        brightness 0.9 6, color 0.2 8
        solarize 0.5 2, invert 0.0 -
        equalize 0.2 -, autocontrast 0.6 -
        equalize 0.2 -, equalize 0.6 -
        color 0.9 9, equalize 0.6 -
        autocontrast 0.8 -, solarize 0.2 8
        brightness 0.1 3, color 0.7 0
        solarize 0.4 5, autocontrast 0.9 -
        translate_y 0.9 9, translate_y 0.7 9
        autocontrast 0.9 -, solarize 0.8 3
        equalize 0.8 -, invert 0.1 -
        translate_y 0.7 9, autocontrast 0.9 -
    """,
    "svhn": """
        shear_x 0.9 4, invert 0.2 -
        shear_y 0.9 8, invert 0.7 -
        equalize 0.6 -, solarize 0.6 6
        invert 0.9 -, equalize 0.6 -
        equalize 0.6 -, rotate 0.9 3
        shear_x 0.9 4, autocontrast 0.8 -
        shear_y 0.9 8, invert 0.4 -
        shear_y 0.9 5, solarize 0.2 6
        invert 0.9 -, autocontrast 0.8 -
        equalize 0.6 -, rotate 0.9 3
        shear_x 0.9 4, solarize 0.3 3
        shear_y 0.8 8, invert 0.7 -
        equalize 0.9 -, translate_y 0.6 6
        invert 0.9 -, equalize 0.6 -
        contrast 0.3 3, rotate 0.8 4
        invert 0.8 -, translate_y 0.0 2
        shear_y 0.7 6, solarize 0.4 8
        invert 0.6 -, rotate 0.8 4
        shear_y 0.3 7, translate_x 0.9 3
        shear_x 0.1 6, invert 0.6 -
        solarize 0.7 2, translate_y 0.6 7
        shear_y 0.8 4, invert 0.8 -
        shear_x 0.7 9, translate_y 0.8 3
        shear_y 0.8 5, autocontrast 0.7 -
        shear_x 0.7 2, invert 0.1 -
    """,
    "imagenet": """
        posterize 0.4 8, rotate 0.6 9
        solarize 0.6 5, autocontrast 0.6 -
        equalize 0.8 -, equalize 0.6 -
        posterize 0.6 7, posterize 0.6 6
        equalize 0.4 -, solarize 0.2 4
        equalize 0.4 -, rotate 0.8 8
        solarize 0.6 3, equalize 0.6 -
        posterize 0.8 5, equalize 1.0 -
        rotate 0.2 3, solarize 0.6 8
        equalize 0.6 -, posterize 0.4 6
        rotate 0.8 8, color 0.4 0
        rotate 0.4 9, equalize 0.6 -
        equalize 0.0 -, equalize 0.8 -
        invert 0.6 -, equalize 1.0 -
        color 0.6 4, contrast 1.0 8
        rotate 0.8 8, color 1.0 2
        color 0.8 8, solarize 0.8 7
        sharpness 0.4 7, invert 0.6 -
        shear_x 0.6 5, equalize 1.0 -
        color 0.4 0, equalize 0.6 -
        equalize 0.4 -, solarize 0.2 4
        solarize 0.6 5, autocontrast 0.6 -
        invert 0.6 -, equalize 1.0 -
        color 0.6 4, contrast 1.0 8
        equalize 0.8 -, equalize 0.6 -
    """,
}


def numbers(name: str) -> list[list[tuple[str, float, int]]]:
    """The 25 sub-policies found on a data set: operation, probability, number of the magnitude in [0, 9].

    Args:
        name: ``cifar10``, ``svhn`` or ``imagenet``.

    Raises:
        UserError: If there is no policy of this name.
    """
    if not isinstance(name, str) or name not in _TABLES:  # names come from files
        raise UserError(f"no published AutoAugment policy is called {name!r}; known: {', '.join(_TABLES)}")
    return [[_read(step) for step in line.split(",")] for line in _TABLES[name].strip().splitlines()]


def _read(text: str) -> tuple[str, float, int]:
    operation, probability, number = text.split()
    assert (number == "-") == (OPS[operation].strongest is None)
    return operation, float(probability), 0 if number == "-" else int(number)


class AutoAugment(Policy):
    """A policy that AutoAugment found and published.

    Cubuk et al., *AutoAugment*, CVPR 2019, https://arxiv.org/abs/1805.09501. Found for large networks on large data:
    it does not know what is safe for other images.

    Args:
        name: The data that it was found on.
        space: If given, the policy is refused when it does more than the space allows; its strengths stay as published.
        interpolation: As :class:`~lightning_automl.augment.policy.ImagePolicy`.
        fill: Likewise.

    Raises:
        UserError: If there is no such policy, or the space forbids a part of it.
    """

    def __init__(
        self,
        name: Literal["cifar10", "svhn", "imagenet"] = "cifar10",
        space: str | dict[str, Any] | OperationSpace | None = None,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | list[float] | None = None,
    ) -> None:
        super().__init__(
            [[Step(step, probability, number / 9) for step, probability, number in steps] for steps in numbers(name)],
            None,
            interpolation,
            fill,
        )
        self.name = name
        if space is not None:
            check_space(self, space)
            self.space = load_space(space)

    def strength(self, step: Step) -> float | None:
        """In AutoAugment's range, whatever the space."""
        strongest = OPS[step.operation].strongest
        return None if strongest is None else step.magnitude * strongest

    def extra_repr(self) -> str:
        """Its name instead of all sub-policies."""
        return f"name={self.name!r}" + (f", space={self.space.name!r}" if self.space else "")

    def arguments(self) -> dict[str, Any]:
        """See :meth:`~lightning_automl.augment.policy.ImagePolicy.arguments`."""
        return {"name": self.name, **self._common()}
