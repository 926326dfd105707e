"""Operations that augmentation policies are made of: what there is, how strong it may be, and in which unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from lightning_automl.rundir import UserError


@dataclass(frozen=True)
class Operation:
    """An operation on images, as policies, spaces and searches see it.

    The strength of an operation is how far it goes from the identity, in its own unit: 0 changes nothing, bit for bit.
    Magnitudes in [0, 1] are shares of the strongest that a space allows. Which pixels become what is in
    :mod:`lightning_automl.augment.geometry` and :mod:`lightning_automl.augment.pixels`.

    Args:
        name: How policies call it.
        kind: ``geometric`` moves pixels, ``pointwise`` changes each pixel by itself (and by statistics of its image),
            ``neighbourhood`` mixes pixels with those around them, ``batch`` mixes images.
        strongest: AutoAugment's range, or this project's for what AutoAugment does not have; None: the operation has
            no strength, and magnitudes do not count.
        limit: The strongest that a space may allow; None as for ``strongest``.
        unit: What a strength counts, in words that follow a number.
        signed: Whether the sign of the strength is drawn: it goes both ways.
        wide: TrivialAugment's wide range, 0 for what is in its list and has no strength, None for what is not in its
            list. Translations are in pixels there, not in shares of the image.
    """

    name: str
    kind: Literal["geometric", "pointwise", "neighbourhood", "batch"]
    strongest: float | None
    limit: float | None
    unit: str
    signed: bool
    wide: float | None


#: Every operation. Ranges: Cubuk et al., *AutoAugment*, 2019, https://arxiv.org/abs/1805.09501 (table 6), wide ones
#: Müller and Hutter, *TrivialAugment*, 2021, https://arxiv.org/abs/2103.10158 (table 1).
OPS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("identity", "pointwise", None, None, "", False, 0),
        Operation("shear_x", "geometric", 0.3, 1.0, "pixels a row", True, 0.99),
        Operation("shear_y", "geometric", 0.3, 1.0, "pixels a column", True, 0.99),
        Operation("translate_x", "geometric", 150 / 331, 1.0, "of the width", True, 32),
        Operation("translate_y", "geometric", 150 / 331, 1.0, "of the height", True, 32),
        Operation("rotate", "geometric", 30, 180, "degrees", True, 135),
        Operation("zoom", "geometric", 0.1, 0.9, "of the scale", True, None),
        Operation("elastic", "geometric", 0.05, 0.2, "of the width", False, None),
        Operation("horizontal_flip", "geometric", None, None, "", False, None),
        Operation("vertical_flip", "geometric", None, None, "", False, None),
        Operation("quarter_turn", "geometric", None, None, "", False, None),
        Operation("crop", "geometric", 0.125, 0.5, "of the size", False, None),
        Operation("autocontrast", "pointwise", None, None, "", False, 0),
        Operation("invert", "pointwise", None, None, "", False, None),
        Operation("equalize", "pointwise", None, None, "", False, 0),
        Operation("solarize", "pointwise", 256, 256, "levels of 256 inverted", False, 256),
        Operation("solarize_add", "pointwise", 110, 128, "levels added below 128", False, None),
        Operation("posterize", "pointwise", 4, 7, "bits removed", False, 6),
        Operation("contrast", "pointwise", 0.9, 0.99, "of the contrast", True, 0.99),
        Operation("color", "pointwise", 0.9, 0.99, "of the colour", True, 0.99),
        Operation("brightness", "pointwise", 0.9, 0.99, "of the brightness", True, 0.99),
        Operation("sharpness", "neighbourhood", 0.9, 0.99, "of the sharpness", True, 0.99),
        Operation("gamma", "pointwise", 0.5, 0.9, "of the exponent", True, None),
        Operation("noise", "pointwise", 0.1, 0.5, "of the range (standard deviation)", False, None),
        Operation("blur", "neighbourhood", 2.0, 10.0, "pixels (standard deviation)", False, None),
        Operation("cutout", "pointwise", 0.2, 1.0, "of the width", False, None),
        Operation("sample_pairing", "batch", 0.4, 1.0, "of another image", False, None),
    )
}

#: What ``base_augment`` of a data module does: not searched, since it is there already.
BASE = ("crop", "horizontal_flip")


def operation(name: str) -> Operation:
    """The operation of this name.

    Raises:
        UserError: If there is none; the closest one is named.
    """
    if not isinstance(name, str) or name not in OPS:  # names come from files
        close = get_close_matches(str(name), OPS, n=1) or [
            known for known in OPS if str(name).lower() in known.split("_")
        ]
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown image operation {name!r}; {hint}known: {', '.join(OPS)}")
    return OPS[name]


def check_keys(content: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    """Refuse a mapping, of a step or a space, with a key that nobody reads.

    Raises:
        UserError: If there is one; the closest known key is named.
    """
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{what} has the unknown key {key!r}; {hint}known: {', '.join(known)}")
