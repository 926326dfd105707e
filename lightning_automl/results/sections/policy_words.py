"""What policies, their operations and strengths are called where people read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_automl.results.sections.wording import counted, joined

#: A true one, as long as a plus.
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class _Wording:
    """What an operation is called.

    Attributes:
        name: In tables.
        done: What an image looks like after it, of the signed strength.
        amount: The strength without its sign; "" where there is none.
    """

    name: str
    done: Callable[[float], str]
    amount: Callable[[float], str] = lambda strength: ""


def _digits(value: float, most: int) -> str:
    """With so many decimals at most, but not 0 for what is not 0."""
    text = f"{value:.{most}f}"
    text = text.rstrip("0").rstrip(".") if most else text
    return text if float(text) or not value else f"less than {10.0**-most:g}"


def _percent(share: float) -> str:
    text = _digits(100 * abs(share), 1)
    return f"{text}\N{NO-BREAK SPACE}%"


def _short(value: float) -> str:
    return _digits(abs(value), 2)


def _degrees(value: float) -> str:
    return f"{_digits(abs(value), 0 if abs(value) >= 9.95 else 1)}°"


def _factor(name: str) -> Callable[[float], str]:
    return lambda strength: f"{name} \N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}{1 + strength:.2f}"


def _towards(words: str, positive: str, negative: str, amount: Callable[[float], str]) -> Callable[[float], str]:
    return lambda strength: f"{words} {positive if strength > 0 else negative} by {amount(strength)}"


def _moved(positive: str, negative: str) -> Callable[[float], str]:
    towards = _towards("moved", positive, negative, _percent)
    return lambda strength: "moved out of the image" if abs(strength) >= 1 else towards(strength)


def _always(words: str) -> Callable[[float], str]:
    return lambda strength: words


def _bits(strength: float) -> int:
    return 8 - round(strength)


#: Signs as in :mod:`lightning_automl.augment.geometry`: positive strengths move to the right or down and turn to the
#: left; of a sheared image the lower rows move to the left, the columns at the right up.
WORDS: dict[str, _Wording] = {
    "identity": _Wording("identity", _always("unchanged")),
    "shear_x": _Wording("shear sideways", _towards("sheared to the", "left", "right", _short), _short),
    "shear_y": _Wording("shear upwards", _towards("sheared", "upwards", "downwards", _short), _short),
    "translate_x": _Wording("shift sideways", _moved("right", "left"), _percent),
    "translate_y": _Wording("shift upwards", _moved("down", "up"), _percent),
    "rotate": _Wording("rotate", _towards("turned", "left", "right", _degrees), _degrees),
    "zoom": _Wording("zoom", _towards("scaled", "up", "down", _percent), _percent),
    "elastic": _Wording("elastic", lambda s: f"elastic, up to {_percent(s)} of the width", _percent),
    "horizontal_flip": _Wording("flip left to right", _always("mirrored left to right")),
    "vertical_flip": _Wording("flip upside down", _always("mirrored upside down")),
    "quarter_turn": _Wording("quarter turns", _always("turned by quarters")),
    "crop": _Wording("crop (random shift)", lambda s: f"shifted by up to {_percent(s)}", _percent),
    "autocontrast": _Wording("autocontrast", _always("autocontrast")),
    "invert": _Wording("invert", _always("inverted")),
    "equalize": _Wording("equalize", _always("equalized")),
    "solarize": _Wording(
        "solarize",
        lambda s: f"solarized from level {256 - s:.0f} on" if s < 256 else "solarized, all levels",
        lambda s: f"from level {256 - s:.0f} on",
    ),
    "solarize_add": _Wording(
        "solarize by adding", lambda s: f"dark levels raised by {s:.0f}", lambda s: f"{s:.0f} levels"
    ),
    "posterize": _Wording("posterize", lambda s: f"{_bits(s)} of 8 bits kept", lambda s: f"{_bits(s)} bits kept"),
    "contrast": _Wording("contrast", _factor("contrast"), _percent),
    "color": _Wording("colour", _factor("colour"), _percent),
    "brightness": _Wording("brightness", _factor("brightness"), _percent),
    "sharpness": _Wording("sharpness", _factor("sharpness"), _percent),
    "gamma": _Wording("gamma", lambda s: f"gamma {1 + s:.2f}", _short),
    "noise": _Wording("noise", lambda s: f"noise of {_percent(s)} of the range", _percent),
    "blur": _Wording("blur", lambda s: f"blurred by {_short(s)} pixels", lambda s: f"{_short(s)} px"),
    "cutout": _Wording("cutout", lambda s: f"square of {_percent(s)} cut out", _percent),
    "sample_pairing": _Wording(
        "mix with another image", lambda s: f"mixed with {_percent(s)} of another image", _percent
    ),
}


def operation_name(name: str) -> str:
    """What an operation is called in a table."""
    return WORDS[name].name if name in WORDS else name.replace("_", " ")


def done_words(name: str, strength: float | None, channels: int = 3) -> str:
    """What an operation of a signed strength has done to an image, or "" where it has changed nothing.

    Args:
        name: Of the operation.
        strength: In its unit; None where it has none.
        channels: Of the images.
    """
    if name == "identity" or strength == 0 or (name == "color" and channels != 3):
        return ""
    if name == "posterize" and strength is not None and _bits(strength) == 8:
        return ""
    if name in WORDS:
        return WORDS[name].done(0.0 if strength is None else strength)
    return operation_name(name) + ("" if strength is None else f" {strength:.3g}")


def strength_words(name: str, strength: float | None, signed: bool) -> str:
    """A strength as it stands in a table, with both signs where they are drawn; "" where an operation has none."""
    if strength is None:
        return ""
    text = WORDS[name].amount(strength) if name in WORDS else f"{strength:.3g}"
    return f"{'±' if signed and text else ''}{text}"


def policy_words(policy: Any) -> str:
    """What a policy is called in a sentence: ``TrivialAugment``, ``a policy of 25 sub-policies``, ``no policy``."""
    name = type(policy).__name__
    if name == "Identity":
        return "no policy"
    if name == "AutoAugment":
        return f"AutoAugment's policy for {policy.name}"
    if name == "Policy":
        count = len(policy)
        return f"a policy of {f'{count:,} sub-policies' if count != 1 else '1 sub-policy'}"
    return name


def space_words(space: Any) -> str:
    """How many operations a space allows, by name."""
    names = [operation_name(name) for name in space.caps if name != "identity"]
    return f"The space {space.name} allows {counted(len(names), 'operation')}: {joined(names)}. No others are used."
