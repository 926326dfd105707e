"""timm's augmentation strings, such as ``rand-m9-mstd0.5-inc1``, drawn for whole batches; timm is not needed."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.augment.engine import Plan
from lightning_automl.augment.policy import PLACES, ImagePolicy, check_space, plan_of, uniform
from lightning_automl.augment.published import numbers
from lightning_automl.augment.spaces import OperationSpace, load_space
from lightning_automl.rundir import UserError

_TEN = 10.0  # magnitudes count in tenths


@dataclass(frozen=True)
class Level:
    """How strong an operation of timm is at a magnitude.

    The strength, in our unit, is ``offset + scale * magnitude / 10``, between ``low`` and ``high``.

    Args:
        operation: Our name.
        scale: Growth from magnitude 0 to 10.
        offset: At magnitude 0.
        low: Smallest.
        high: Largest.
        whole: Whether the product is cut to a whole number.
        mirrored: Whether its sign is drawn.
        uniform: Whether the strength is drawn between 0.1 and this one.
    """

    operation: str
    scale: float = 0.0
    offset: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    mirrored: bool = False
    uniform: bool = False

    def strength(self, magnitude: float, sign: int = 1) -> float:
        """Signed strength; what is drawn uniformly is at its strongest."""
        product = self.scale * (magnitude / _TEN)
        value = self.offset + (math.trunc(product) if self.whole else product)
        return min(max(sign * value, self.low), self.high)


def _factor(operation: str) -> Level:
    return Level(operation, 1.8, -0.9)  # 0.1 at magnitude 0, 1.9 at 10


def _increasing(operation: str) -> Level:
    return Level(operation, 0.9, low=-0.9, mirrored=True)


#: timm's operations (``timm/data/auto_augment.py``, ``LEVEL_TO_ARG``), in our words; those that count pixels are left
#: out: no string names them. Its magnitudes do not all grow away from the identity: ``Posterize`` 0 keeps no bits.
LEVELS: dict[str, Level] = {
    "AutoContrast": Level("autocontrast"),
    "Equalize": Level("equalize"),
    "Invert": Level("invert"),
    "Rotate": Level("rotate", 30, mirrored=True),
    "Posterize": Level("posterize", -4, 8, low=0, whole=True),
    "PosterizeIncreasing": Level("posterize", 4, 4, high=8, whole=True),
    "PosterizeOriginal": Level("posterize", -4, 4, low=0, whole=True),
    "Solarize": Level("solarize", -256, 256, low=0, whole=True),
    "SolarizeIncreasing": Level("solarize", 256, high=256, whole=True),
    "SolarizeAdd": Level("solarize_add", 110, high=128, whole=True),
    "Color": _factor("color"),
    "ColorIncreasing": _increasing("color"),
    "Contrast": _factor("contrast"),
    "ContrastIncreasing": _increasing("contrast"),
    "Brightness": _factor("brightness"),
    "BrightnessIncreasing": _increasing("brightness"),
    "Sharpness": _factor("sharpness"),
    "SharpnessIncreasing": _increasing("sharpness"),
    "ShearX": Level("shear_x", 0.3, mirrored=True),
    "ShearY": Level("shear_y", 0.3, mirrored=True),
    "TranslateXRel": Level("translate_x", 0.45, mirrored=True),
    "TranslateYRel": Level("translate_y", 0.45, mirrored=True),
    "Desaturate": Level("color", -0.5, -0.5, low=-1, high=-0.5),
    "GaussianBlur": Level("blur", 1.9, 0.1, high=2),
    "GaussianBlurRand": Level("blur", 2, low=0, high=2, uniform=True),
}

#: What ``rand`` draws from; with ``inc1`` the increasing form of those that have one.
_DRAWN = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)

#: Other sets that ``rand`` can draw from: ``t`` and the name; with weights, without replacement.
_SETS: dict[str, dict[str, float] | tuple[str, ...]] = {
    "3a": ("SolarizeIncreasing", "Desaturate", "GaussianBlur"),
    "3aw": {
        **{"SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2},
        **{"PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1},
        **{"ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1},
    },
    "weights": {
        **{"Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25},
        **{"SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05},
        **{"ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05},
        "Invert": 0.05,
    },
}

#: ``v0`` and, with another Posterize, ``v0r``: operation, probability, magnitude.
_V0 = """
    Equalize 0.8 1, ShearY 0.8 4
    Color 0.4 9, Equalize 0.6 3
    Color 0.4 1, Rotate 0.6 8
    Solarize 0.8 3, Equalize 0.4 7
    Solarize 0.4 2, Solarize 0.6 2
    Color 0.2 0, Equalize 0.8 8
    Equalize 0.4 8, SolarizeAdd 0.8 3
    ShearX 0.2 9, Rotate 0.6 8
    Color 0.6 1, Equalize 1.0 2
    Invert 0.4 9, Rotate 0.6 0
    Equalize 1.0 9, ShearY 0.6 3
    Color 0.4 7, Equalize 0.6 0
    Posterize 0.4 6, AutoContrast 0.4 7
    Solarize 0.6 8, Color 0.6 9
    Solarize 0.2 4, Rotate 0.8 9
    Rotate 1.0 7, TranslateYRel 0.8 9
    ShearX 0.0 0, Solarize 0.8 4
    ShearY 0.8 0, Color 0.6 4
    Color 1.0 0, Rotate 0.6 2
    Equalize 0.8 4, Equalize 0.0 8
    Equalize 1.0 4, AutoContrast 0.6 2
    ShearY 0.4 7, SolarizeAdd 0.6 7
    Posterize 0.8 2, Solarize 0.6 10
    Solarize 0.6 8, Equalize 0.6 1
    Color 0.8 6, Rotate 0.4 5
"""

_3A = "Solarize 1.0 5\nDesaturate 1.0 10\nGaussianBlurRand 1.0 10"

_CAPITALS = {"shear_x": "ShearX", "shear_y": "ShearY", "autocontrast": "AutoContrast"}

Triple = tuple[str, float, float]  # timm's name, probability, magnitude


@dataclass(frozen=True)
class Recipe:
    """What a string says.

    Args:
        sub_policies: Of one of timm's policies; of ``rand`` one a operation, of one step.
        layers: How many operations ``rand`` draws; 0: it is a policy, of which one sub-policy is drawn.
        weights: Of the operations of ``rand``, which then are drawn without replacement.
        deviation: Standard deviation of magnitudes; infinite: they are uniform from 0.
        largest: Magnitudes are cut to [0, largest].
    """

    sub_policies: tuple[tuple[Triple, ...], ...]
    layers: int = 0
    weights: tuple[float, ...] = field(default=())
    deviation: float = 0.0
    largest: float = _TEN


class TimmAugment(ImagePolicy):
    """A policy by the string that timm's training scripts take as ``--aa``, drawn for each image of a batch.

    RandAugment: ``rand`` and, each after a dash, ``m`` magnitude (10), ``n`` operations (2), ``p`` probability of each
    (0.5), ``mstd`` standard deviation of the magnitude (0; above 100: uniform from 0), ``mmax`` its upper limit (10),
    ``inc1`` for operations that grow with the magnitude, ``t`` a set of operations (``weights``, ``3a``, ``3aw``).
    AutoAugment for ImageNet: ``original``, ``originalr``, ``v0``, ``v0r``, or ``3a``, and ``mstd``. Magnitudes count in
    tenths, and without ``inc1`` several do not grow away from the identity: these are timm's strengths, not ours.

    One thing differs: timm reads pixels bilinearly or bicubically, as a coin falls.

    Args:
        config: The string.
        space: If given, the policy is refused when it does more than the space allows; its strengths stay timm's.
        interpolation: As :class:`~lightning_automl.augment.ImagePolicy`.
        fill: What comes in from outside; None: middle grey, timm's (128, 128, 128).

    Raises:
        UserError: If timm would not take the string, or it is ``augmix``; if the space forbids a part of it.
    """

    def __init__(
        self,
        config: str,
        space: str | dict[str, Any] | OperationSpace | None = None,
        interpolation: Literal["nearest", "bilinear"] = "bilinear",
        fill: float | list[float] | None = None,
    ) -> None:
        super().__init__(None, interpolation, fill)
        self.config = config
        self.recipe = read_config(config)
        length = self.recipe.layers or max(len(steps) for steps in self.recipe.sub_policies)
        nothing = ("", 0.0, 0.0)
        rows = [(*steps, *[nothing] * (length - len(steps))) for steps in self.recipe.sub_policies]
        if self.recipe.layers:
            rows = [row[:1] for row in rows]
        levels = [[LEVELS.get(name, Level("identity")) for name, _, _ in row] for row in rows]

        def table(values: list[list[float]]) -> NDArray[np.float64]:
            return np.array(values, dtype=np.float64)

        self._length = length
        self._places: NDArray[np.int64] = np.array([[PLACES[level.operation] for level in row] for row in levels])
        self._probabilities = table([[probability for _, probability, _ in row] for row in rows])
        self._magnitudes = table([[magnitude for _, _, magnitude in row] for row in rows])
        self._scales = table([[level.scale for level in row] for row in levels])
        self._offsets = table([[level.offset for level in row] for row in levels])
        self._lows = table([[level.low for level in row] for row in levels])
        self._highs = table([[level.high for level in row] for row in levels])
        self._mirrored = table([[0.5 * level.mirrored for level in row] for row in levels])
        self._whole: NDArray[np.bool_] = np.array([[level.whole for level in row] for row in levels])
        self._uniform: NDArray[np.bool_] = np.array([[level.uniform for level in row] for row in levels])
        if space is not None:
            check_space(self, space)
            self.space = load_space(space)

    def draw(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Plan:
        """For each image operations, their magnitudes and signs; see :meth:`ImagePolicy.draw`."""
        length, recipe = self._length, self.recipe
        kinds = 6 if recipe.deviation else 4
        options = len(self._places)
        heads = options if recipe.weights else max(1, recipe.layers)
        drawn = uniform(count, heads + kinds * length, generator)
        applied, signs, seeds, shares, *noise = np.split(drawn[:, heads:], kinds, axis=1)
        if recipe.weights:
            # the largest of log(weight) + Gumbel noise come out as draws without replacement do
            keys = np.log(recipe.weights) - np.log(-np.log(drawn[:, :heads].clip(1e-300, 1 - 2**-53)))
            chosen: Any = (np.argsort(-keys, axis=1)[:, :length], 0)
        elif recipe.layers:
            chosen = ((drawn[:, :heads] * options).astype(np.int64), 0)
        else:
            chosen = (drawn[:, 0] * options).astype(np.int64)
        magnitude = self._magnitudes[chosen]
        if recipe.deviation == math.inf:
            magnitude = magnitude * noise[0]
        elif recipe.deviation:  # Box and Muller
            normal = np.sqrt(-2 * np.log1p(-noise[0])) * np.cos(2 * np.pi * noise[1])
            magnitude = magnitude + recipe.deviation * normal
        product = self._scales[chosen] * (magnitude.clip(0, recipe.largest) / _TEN)
        value = self._offsets[chosen] + np.where(self._whole[chosen], np.trunc(product), product)
        value = np.where(signs < self._mirrored[chosen], -value, value)
        value = np.clip(value, self._lows[chosen], self._highs[chosen])
        value = np.where(self._uniform[chosen], 0.1 + shares * (value - 0.1), value)
        places = np.where(applied < self._probabilities[chosen], self._places[chosen], PLACES["identity"])
        return plan_of(places, value, seeds)

    def filling(self, images: Tensor) -> float | list[float] | None:
        """Middle grey unless there is a fill."""
        if self.fill is not None:
            return self.fill
        return 128.0 if images.dtype == torch.uint8 else 128 / 255

    def strongest(self) -> dict[str, float | None]:
        """See :meth:`ImagePolicy.strongest`."""
        result: dict[str, float | None] = {}
        for steps in self.recipe.sub_policies:
            for name, _, magnitude in steps:
                level, ends = LEVELS[name], [min(magnitude, self.recipe.largest)]
                if self.recipe.deviation:
                    ends = [0.0, ends[0] if self.recipe.deviation == math.inf else self.recipe.largest]
                signs = (1, -1) if level.mirrored else (1,)
                found = max(abs(level.strength(end, sign)) for end in ends for sign in signs)
                if not level.scale:
                    result[level.operation] = None
                else:
                    result[level.operation] = max(found, result.get(level.operation) or 0.0)
        return result

    def arguments(self) -> dict[str, Any]:
        """See :meth:`ImagePolicy.arguments`."""
        return {"config": self.config, **self._common()}


def read_config(config: str) -> Recipe:
    """What timm makes of a string.

    Raises:
        UserError: If timm would not take it, or would silently leave out a part of it, or it is ``augmix``.
    """
    if not isinstance(config, str):
        raise UserError(f"{config!r} is no augmentation string of timm; give a text such as rand-m9-mstd0.5-inc1")
    name, *sections = config.split("-")
    if name == "augmix":
        raise UserError(f"{config}: augmix blends several augmented copies of an image, which no policy here can do")
    if name == "rand":
        return _rand(config, sections)
    if name not in ("original", "originalr", "v0", "v0r", "3a"):
        raise UserError(
            f"unknown augmentation string {config!r} of timm; known: rand, original, originalr, v0, v0r, 3a, and their "
            "sections, such as rand-m9-mstd0.5-inc1"
        )
    values = _sections(config, sections, ("mstd",))
    return Recipe(_policy(name), deviation=_number(config, "mstd", values.get("mstd", "0")))


def _rand(config: str, sections: list[str]) -> Recipe:
    sets = [section[1:] for section in sections if section.startswith("t")]
    rest = [section for section in sections if not section.startswith("t")]
    values = _sections(config, rest, ("m", "n", "p", "mstd", "mmax", "inc"))
    whole = {key: _number(config, key, values.get(key, default), whole=True) for key, default in _DEFAULTS.items()}
    probability = _number(config, "p", values.get("p", "0.5"))
    deviation = _number(config, "mstd", values.get("mstd", "0"))
    if probability > 1:
        raise UserError(f"{config}: p is {probability:g}; give a probability in [0, 1]")
    if whole["n"] < 1:
        raise UserError(f"{config}: n is 0; give at least 1 operation (Identity() does nothing)")
    weights: tuple[float, ...] = ()
    names: tuple[str, ...] = _DRAWN
    if whole["inc"]:
        names = tuple(f"{name}Increasing" if f"{name}Increasing" in LEVELS else name for name in _DRAWN)
    if sets:
        if sets[0] not in _SETS:
            raise UserError(f"{config}: unknown set of operations {sets[0]!r}; known: {', '.join(_SETS)}")
        chosen = _SETS[sets[0]]
        names = tuple(chosen)
        if isinstance(chosen, dict):
            weights = tuple(chosen.values())
    layers = int(whole["n"])
    if weights and layers > len(weights):
        raise UserError(f"{config}: n is {layers}, and {sets[0]} has {len(weights)} operations; give at most as many")
    return Recipe(
        tuple(((name, probability, whole["m"]),) for name in names),
        layers,
        weights,
        math.inf if deviation > 100 else deviation,
        whole["mmax"] or _TEN,
    )


_DEFAULTS = {"m": "10", "n": "2", "mmax": "0", "inc": "0"}


def _sections(config: str, sections: list[str], known: tuple[str, ...]) -> dict[str, str]:
    values: dict[str, str] = {}
    for section in sections:
        found = re.fullmatch(r"([a-z]*)(\d.*)", section)
        if not found or found[1] not in known:
            raise UserError(
                f"{config}: unknown section {section!r}; known: {', '.join(known)}, each followed by a number"
            )
        if found[1] in values and found[1] not in ("m", "n", "p", "inc"):
            continue  # timm takes the first of these, and the last of the others
        values[found[1]] = found[2]
    return values


def _number(config: str, key: str, text: str, *, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{config}: {key} is {text!r}; give {kind}") from error


def _policy(name: str) -> tuple[tuple[Triple, ...], ...]:
    posterize = "Posterize"
    if name == "3a":
        lines = _3A
    elif name.startswith("v0"):
        lines = _V0
        posterize = "PosterizeIncreasing" if name == "v0r" else posterize
    else:
        lines = "\n".join(
            ", ".join(
                f"{_CAPITALS.get(step, step.capitalize())} {probability} {number}"
                for step, probability, number in steps
            )
            for steps in numbers("imagenet")
        )
        posterize = "PosterizeOriginal" if name == "original" else "PosterizeIncreasing"
    result = []
    for line in lines.strip().splitlines():
        steps = [step.split() for step in line.split(",")]
        result.append(
            tuple(
                (posterize if step == "Posterize" else step, float(probability), float(number))
                for step, probability, number in steps
            )
        )
    return tuple(result)
