"""Policies from and to torchvision and timm, with the same operations at the same strengths.

Magnitudes mean other things there: torchvision counts ten or 31 steps away from the identity, timm tenths that for some
operations grow towards it. What cannot be said exactly in the other library's words is refused, never approximated.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from lightning_automl.augment.geometry import Interpolation
from lightning_automl.augment.ops import OPS
from lightning_automl.augment.policy import Identity, ImagePolicy, Policy, Step, check_space
from lightning_automl.augment.published import AutoAugment
from lightning_automl.augment.random_policies import RandAugment, TrivialAugment
from lightning_automl.augment.spaces import OperationSpace, load_space
from lightning_automl.augment.timm_augment import LEVELS, TimmAugment
from lightning_automl.rundir import UnsupportedError, UserError

#: torchvision's names of what its AutoAugment does.
TORCHVISION = {
    **{"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"},
    **{"Rotate": "rotate", "Brightness": "brightness", "Color": "color", "Contrast": "contrast"},
    **{"Sharpness": "sharpness", "Posterize": "posterize", "Solarize": "solarize", "AutoContrast": "autocontrast"},
    **{"Equalize": "equalize", "Invert": "invert"},
}

_TO_TORCHVISION = {ours: theirs for theirs, ours in TORCHVISION.items()}

_BINS = 10  # magnitudes of torchvision's AutoAugment

_LARGEST = 1e6  # a limit for timm's magnitudes that none reaches


def from_torchvision(
    transform: Any, space: str | dict[str, Any] | OperationSpace | None = None
) -> Policy | RandAugment | TrivialAugment:
    """A policy that does what a transform of torchvision does, but with a draw for each image of a batch.

    Translations are not cut to whole pixels before, and ``Solarize`` counts to 256 instead of 255: at most a pixel and
    a level of difference.

    Args:
        transform: An ``AutoAugment``, ``RandAugment`` or ``TrivialAugmentWide`` of ``torchvision.transforms`` or its
            ``v2``, an ``AutoAugmentPolicy`` or its value (``imagenet``, ``cifar10``, ``svhn``), or the name of one of
            these classes with its defaults (``ra`` and ``ta_wide``, as torchvision's training script calls them, too).
        space: If given, the result is refused when it does more than the space allows; except for random policies, it
            is also the space of the result, which the data modules' ``base_augment`` obeys.

    Raises:
        UserError: If it is something else (``AugMix`` blends several copies), or reads pixels in a way not known here.
    """
    policy = _named(transform) if isinstance(transform, str | AutoAugmentPolicy) else _transformed(transform)
    return policy if space is None else _within(policy, space)


def _named(name: str | AutoAugmentPolicy) -> Policy | RandAugment | TrivialAugment:
    text = name.value if isinstance(name, AutoAugmentPolicy) else name
    known: dict[str, Callable[[], Policy | RandAugment | TrivialAugment]] = {
        **{"imagenet": lambda: AutoAugment("imagenet"), "cifar10": lambda: AutoAugment("cifar10")},
        **{"svhn": lambda: AutoAugment("svhn"), "AutoAugment": lambda: AutoAugment("imagenet")},
        **{"RandAugment": RandAugment, "TrivialAugmentWide": TrivialAugment},
        **{"ra": RandAugment, "ta_wide": TrivialAugment},
    }
    if text.lower() == "augmix":
        raise UnsupportedError("AugMix blends several augmented copies of an image, which no policy here can do")
    if text not in known:
        close = get_close_matches(text, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown augmentation {text!r} of torchvision; {hint}known: {', '.join(known)}")
    return known[text]()


def _transformed(transform: Any) -> Policy | RandAugment | TrivialAugment:
    classes = (v1.AutoAugment, v2.AutoAugment, v1.RandAugment, v2.RandAugment)
    if not isinstance(transform, (*classes, v1.TrivialAugmentWide, v2.TrivialAugmentWide)):
        raise UserError(
            f"{type(transform).__name__} cannot be made a policy; give torchvision's AutoAugment, RandAugment or "
            "TrivialAugmentWide, or one of their names"
        )
    interpolation, fill = _interpolation(transform.interpolation), _fill(transform.fill)
    if isinstance(transform, v1.TrivialAugmentWide | v2.TrivialAugmentWide):
        return TrivialAugment(None, transform.num_magnitude_bins, interpolation, fill)
    if isinstance(transform, v1.RandAugment | v2.RandAugment):
        bins = transform.num_magnitude_bins
        return RandAugment(transform.num_ops, transform.magnitude, None, bins, interpolation, fill)
    table = transform.policies if isinstance(transform, v1.AutoAugment) else transform._policies
    steps = [
        [Step(TORCHVISION[name], probability, (number or 0) / (_BINS - 1)) for name, probability, number in pair]
        for pair in table
    ]
    policy = Policy(steps, None, interpolation, fill)
    for name in AutoAugmentPolicy:
        same = AutoAugment(name.value, None, interpolation, fill)
        if same.sub_policies == policy.sub_policies:
            return same
    return policy


def _within(
    policy: Policy | RandAugment | TrivialAugment, space: str | dict[str, Any] | OperationSpace
) -> Policy | RandAugment | TrivialAugment:
    """The same policy, checked against a space; its strengths stay. Random policies have no place to keep the space."""
    check_space(policy, space)
    if isinstance(policy, AutoAugment):
        return AutoAugment(policy.name, space, policy.interpolation, policy.fill)
    if isinstance(policy, Policy):
        within = load_space(space)
        return Policy(policy.restated(within), within, policy.interpolation, policy.fill)
    return policy


def _interpolation(mode: Any) -> Interpolation:
    name = mode.value if isinstance(mode, InterpolationMode) else {0: "nearest", 2: "bilinear"}.get(mode, mode)
    if name not in ("nearest", "bilinear"):
        raise UnsupportedError(f"the transform reads pixels by {name!r}; policies know nearest and bilinear")
    return name  # type: ignore[no-any-return]


def _fill(fill: Any) -> float | list[float] | None:
    if fill is None or (isinstance(fill, int | float) and not isinstance(fill, bool)):
        return fill
    if isinstance(fill, Sequence) and not isinstance(fill, str):
        return [float(value) for value in fill]
    raise UnsupportedError(f"the transform fills with {fill!r}; policies fill with one level, or one a channel")


def to_torchvision(policy: ImagePolicy) -> Any:
    """A transform of ``torchvision.transforms.v2`` that draws from the same operations at the same strengths.

    A :class:`Policy` becomes an ``AutoAugment`` with own sub-policies: it needs at most two steps in each, operations
    that torchvision's has, no fixed signs, and strengths that are ninths of AutoAugment's ranges (a search over 10
    magnitudes in the space ``natural`` gives these). Note that torchvision draws once for a whole batch.

    Raises:
        UnsupportedError: If torchvision cannot express it; the step that it cannot is named.
    """
    common = {"interpolation": InterpolationMode(policy.interpolation), "fill": policy.fill}
    if isinstance(policy, AutoAugment):
        return v2.AutoAugment(AutoAugmentPolicy(policy.name), **common)
    if isinstance(policy, Policy):
        transform = v2.AutoAugment(**common)
        transform._policies = [
            _pair([found for step in steps if (found := _torchvision_step(policy, step))], steps)
            for steps in policy.sub_policies
        ]
        return transform
    if isinstance(policy, Identity):
        return v2.Identity()
    if isinstance(policy, TrivialAugment | RandAugment) and policy.space is not None:
        raise UnsupportedError(
            f"torchvision's {type(policy).__name__} has its own operations and ranges, not those of the space "
            f"{policy.space.name!r}; export a Policy, or leave the space out"
        )
    if isinstance(policy, TrivialAugment):
        return v2.TrivialAugmentWide(num_magnitude_bins=policy.bins, **common)
    if isinstance(policy, RandAugment):
        return v2.RandAugment(policy.num_ops, policy.magnitude, policy.bins, **common)
    raise UnsupportedError(f"torchvision has nothing like {type(policy).__name__}")


_TorchvisionStep = tuple[str, float, int | None]


def _pair(steps: list[_TorchvisionStep], given: tuple[Step, ...]) -> tuple[_TorchvisionStep, ...]:
    if len(steps) > 2:
        names = ", ".join(step.operation for step in given)
        raise UnsupportedError(f"torchvision's sub-policies have two steps, and one here has {len(steps)}: {names}")
    never: _TorchvisionStep = ("Invert", 0.0, None)  # as in its own tables
    return (*steps, *[never] * (2 - len(steps)))


def _torchvision_step(policy: Policy, step: Step) -> _TorchvisionStep | None:
    """None if the step changes nothing."""
    strength = policy.strength(step)
    if step.operation == "identity" or step.probability == 0 or strength == 0:
        return None
    name = _TO_TORCHVISION.get(step.operation)
    if name is None:
        raise UnsupportedError(
            f"torchvision's AutoAugment has no {step.operation}; it has {', '.join(_TO_TORCHVISION)}"
        )
    if step.sign:
        raise UnsupportedError(
            f"torchvision draws the sign of {step.operation}, and the step fixes it to {step.sign:+d}"
        )
    if strength is None:
        return name, step.probability, None
    strongest = OPS[step.operation].strongest
    assert strongest is not None
    share = strength / strongest * (_BINS - 1)
    number = min(range(_BINS), key=lambda number: abs(number - share))
    exact = abs(share - number) < 1e-6
    if step.operation == "posterize" and not exact:  # both round to whole bits
        same = [other for other in range(_BINS) if round(other / (_BINS - 1) * strongest) == round(strength)]
        number, exact = (same[0], True) if same else (number, False)
    if not exact:
        unit = OPS[step.operation].unit
        raise UnsupportedError(
            f"torchvision's AutoAugment has {_BINS} strengths of {step.operation} from 0 to {strongest:.4g} {unit}, "
            f"and {strength:.4g} is none of them; round the magnitude to a ninth of that range"
        )
    return name, step.probability, number


def from_timm(augmentation: Any, space: str | dict[str, Any] | OperationSpace | None = None) -> TimmAugment | Policy:
    """A policy that does what an augmentation of timm does.

    Args:
        augmentation: A string as training scripts take it (``rand-m9-mstd0.5-inc1``: :class:`TimmAugment` draws it
            exactly), an ``AutoAugment`` of timm, or its sub-policies, lists of (name, probability, magnitude): these
            become a :class:`Policy`.
        space: If given, what the magnitudes of the policy are shares of, and what a string may do at most.

    Raises:
        UserError: If timm would not take the string, or a step cannot be expressed here; it is named.
    """
    if isinstance(augmentation, str):
        return TimmAugment(augmentation, space)
    sub_policies = getattr(augmentation, "policy", augmentation)
    if not isinstance(sub_policies, Sequence):
        raise UserError(
            f"{type(augmentation).__name__} cannot be made a policy; give timm's string, its AutoAugment, or lists of "
            "(name, probability, magnitude)"
        )
    within = None if space is None else load_space(space)
    steps = [[_from_timm_step(step, within) for step in steps] or [Step("identity")] for steps in sub_policies]
    return Policy(steps, within, "bilinear")


def _from_timm_step(step: Any, space: OperationSpace | None) -> Step:
    share = 0.45
    if isinstance(step, tuple | list) and len(step) == 3:
        name, probability, magnitude = step
    elif hasattr(step, "level_fn"):
        name, probability, magnitude = step.name, step.prob, min(step.magnitude, step.magnitude_max or 10)
        share = step.hparams.get("translate_pct", share)
        if step.magnitude_std:
            raise UnsupportedError(f"magnitudes of {name} vary; give timm's string, which TimmAugment draws exactly")
    else:
        raise UserError(f"{step!r} is no step of timm; give (name, probability, magnitude)")
    if name not in LEVELS:
        close = get_close_matches(str(name), LEVELS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown operation {name!r} of timm; {hint}known: {', '.join(LEVELS)}")
    level = LEVELS[name]
    if level.uniform:
        raise UnsupportedError(f"the strength of {name} is drawn; give timm's string, which TimmAugment draws exactly")
    strength = level.strength(magnitude)
    if name.startswith("Translate"):
        strength *= share / 0.45
    if level.mirrored and level.strength(magnitude, -1) != -level.strength(magnitude):
        raise UnsupportedError(
            f"{name} at magnitude {magnitude} is not as strong in both directions, as steps are here"
        )
    if not level.scale:
        return Step(level.operation, probability, 0.0)
    cap = OPS[level.operation].strongest if space is None else space.cap(level.operation)
    assert cap is not None
    if abs(strength) > cap * (1 + 1e-9):
        unit = OPS[level.operation].unit
        raise UnsupportedError(
            f"{name} at magnitude {magnitude} is {level.operation} by {abs(strength):.4g} {unit}, and the strongest "
            f"{'here' if space is None else f'in the space {space.name!r}'} is {cap:.4g}; give a space that allows it"
        )
    sign: Any = 0 if level.mirrored or not OPS[level.operation].signed or not strength else 1 if strength > 0 else -1
    return Step(level.operation, probability, min(1.0, abs(strength) / cap), sign)


def to_timm(policy: ImagePolicy) -> Any:
    """An augmentation of timm, for PIL images, that draws from the same operations at the same strengths.

    A :class:`Policy` becomes timm's ``AutoAugment``; random policies become its ``RandAugment`` with our operations in
    place of its own (for :class:`TrivialAugment` one for each operation and magnitude); a :class:`TimmAugment` is what
    timm makes of its string, which is ``policy.config``.

    Raises:
        UnsupportedError: If timm cannot express it; the step that it cannot is named.
        UserError: If timm is not installed.
    """
    try:
        timm: Any = importlib.import_module("timm.data.auto_augment")  # its functions carry no types
    except ImportError as error:
        raise UserError("timm is not installed; install it with pip install 'lightning-automl[timm]'") from error
    options = {"img_mean": _colour(policy), "interpolation": getattr(Image.Resampling, policy.interpolation.upper())}
    if isinstance(policy, TimmAugment):
        make = timm.rand_augment_transform if policy.recipe.layers else timm.auto_augment_transform
        return make(policy.config, dict(options))
    if isinstance(policy, Policy):
        return timm.AutoAugment(
            [
                [
                    _timm_step(timm, step.operation, step.probability, policy.strength(step), step.sign, options)
                    for step in steps
                    if step.operation != "identity"
                ]
                for steps in policy.sub_policies
            ]
        )
    if isinstance(policy, Identity):
        return timm.AutoAugment([[]])
    if not isinstance(policy, TrivialAugment | RandAugment):
        raise UnsupportedError(f"timm has nothing like {type(policy).__name__}")
    pixels = isinstance(policy, TrivialAugment) and policy.space is None
    operations = []
    for name in policy.drawn:
        cap = policy.cap(name)
        for number in [policy.magnitude] if isinstance(policy, RandAugment) else range(policy.bins):
            strength = None if cap is None else cap * number / (policy.bins - 1)
            if pixels and name.startswith("translate"):
                operations.append(_timm_pixels(timm, name, strength or 0.0, options))
            else:
                operations.append(_timm_step(timm, name, 1.0, strength, 0, options))
    return timm.RandAugment(operations, policy.num_ops if isinstance(policy, RandAugment) else 1)


def _colour(policy: ImagePolicy) -> tuple[int, ...]:
    fill = policy.fill if policy.fill is not None else 128 if isinstance(policy, TimmAugment) else 0
    values = fill if isinstance(fill, list) else [fill] * 3
    return tuple(round(value) for value in values)


_PLAIN = {"autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert"}
_LINEAR = {"rotate": "Rotate", "shear_x": "ShearX", "shear_y": "ShearY"}
_RELATIVE = {"translate_x": "TranslateXRel", "translate_y": "TranslateYRel"}
_FACTORS = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}


def _timm_step(
    timm: Any, operation: str, probability: float, strength: float | None, sign: int, options: dict[str, Any]
) -> Any:
    """One of timm's operations; every magnitude is taken as it is, however large."""
    hparams = {**options, "magnitude_max": _LARGEST}
    if operation == "identity" or strength == 0:  # done never, whatever it is
        return timm.AugmentOp("Invert", 0.0, 0, hparams)
    if operation in _PLAIN:
        return timm.AugmentOp(_PLAIN[operation], probability, 0, hparams)
    assert strength is not None
    if sign and operation not in _FACTORS:
        raise UnsupportedError(f"timm draws the sign of {operation}, and the step fixes it to {sign:+d}")
    if operation in _LINEAR:
        name = _LINEAR[operation]
        magnitude = 10 * strength / LEVELS[name].scale
    elif operation in _RELATIVE:
        name, magnitude = _RELATIVE[operation], 10.0
        hparams["translate_pct"] = strength
    elif operation in _FACTORS and sign:
        name, magnitude = _FACTORS[operation], 10 * (sign * strength + 0.9) / 1.8
    elif operation in _FACTORS:
        name, magnitude = f"{_FACTORS[operation]}Increasing", 10 * strength / 0.9
    elif operation == "posterize":  # in the middle between the magnitudes where the whole number changes
        bits = round(strength)
        name = "PosterizeOriginal" if bits <= 4 else "PosterizeIncreasing"
        magnitude = 2.5 * ((4 - bits if bits <= 4 else bits - 4) + 0.5)
    elif operation in ("solarize", "solarize_add"):
        name = "SolarizeIncreasing" if operation == "solarize" else "SolarizeAdd"
        magnitude = 10 * (math.floor(strength + 1e-9) + 0.5) / LEVELS[name].scale  # whole levels, as here
    elif operation == "blur":
        name, magnitude = "GaussianBlur", 10 * (strength - 0.1) / 1.9
    else:
        raise UnsupportedError(f"timm has no {operation}; leave it out of the policy")
    weak = (operation in _FACTORS and (strength > 0.9 + 1e-9 if not sign else magnitude < -1e-9)) or (
        operation == "blur" and not 0.1 <= strength <= 2
    )
    if weak:
        reach = "0.1 to 2 pixels" if operation == "blur" else "a factor of 0.1 at the least"
        raise UnsupportedError(
            f"timm's {operation} goes from {reach}, and the policy has a strength of {strength:.4g} "
            f"{OPS[operation].unit}; lower the magnitude"
        )
    return timm.AugmentOp(name, probability, max(0.0, magnitude), hparams)


def _timm_pixels(timm: Any, operation: str, pixels: float, options: dict[str, Any]) -> Any:
    """A translation by pixels, whatever the size of the image."""
    name = "TranslateX" if operation == "translate_x" else "TranslateY"
    return timm.AugmentOp(name, 1.0, 10, {**options, "translate_const": pixels})
