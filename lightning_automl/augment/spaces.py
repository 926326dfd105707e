"""Spaces of operations that are safe for a kind of images: what is allowed, and how strongly at most."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from lightning_automl.augment.ops import BASE, OPS, check_keys, operation
from lightning_automl.rundir import UserError


@dataclass(frozen=True)
class OperationSpace:
    """Operations that keep the label of an image of some kind, each with the strongest that does.

    What is not listed is forbidden: it is not made less likely, it is refused. ``identity`` is always allowed.

    Args:
        name: What to call the space.
        caps: Strongest strength allowed by operation, in the operation's own unit
            (:data:`~lightning_automl.augment.OPS`); None for operations that have no strength.
        reason: Why the space is as it is, one sentence.

    Raises:
        UserError: If an operation is unknown, a cap is not a number above 0 and up to the operation's limit, or
            nothing is allowed.
    """

    name: str
    caps: Mapping[str, float | None] = field(hash=False)
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        checked = {name: _cap(name, cap, self.name) for name, cap in self.caps.items()}
        object.__setattr__(
            self, "caps", {name: checked[name] for name in OPS if name in checked and name != "identity"}
        )
        if not self.caps:
            raise UserError(
                f"the space {self.name!r} allows no operation; list some under operations, such as {{rotate: 15}}"
            )

    def allows(self, name: str) -> bool:
        """Whether the operation may be done at all; of an unknown one it is an error."""
        return operation(name).name in self.caps or name == "identity"

    def cap(self, name: str) -> float | None:
        """Strongest that is allowed, in the operation's unit; None if the operation has no strength.

        Raises:
            UserError: If the operation is unknown or forbidden.
        """
        if not self.allows(name):
            raise UserError(
                f"{name} is forbidden in the space {self.name!r}{f' ({self.reason})' if self.reason else ''}; "
                f"allowed: {', '.join(self.caps)}; leave it out or give another space"
            )
        return self.caps.get(name)

    def searched(self) -> tuple[str, ...]:
        """The operations that a search chooses from: all but ``identity`` and those of ``base_augment``."""
        return tuple(name for name in self.caps if name not in BASE)

    def to_dict(self) -> dict[str, Any]:
        """What :func:`load_space` makes an equal space of: name, operations, reason."""
        listed = {name: True if cap is None else cap for name, cap in self.caps.items()}
        return {"name": self.name, "operations": listed, "reason": self.reason}


def _cap(name: str, cap: Any, space: str) -> float | None:
    known = operation(name)
    if known.strongest is None or known.limit is None:
        if cap is None or cap is True:
            return None
        raise UserError(f"{name} has no strength, and the space {space!r} gives it {cap!r}; give true, or leave it out")
    if cap is None or cap is True:
        return known.strongest
    if isinstance(cap, bool) or not isinstance(cap, Real) or not 0 < float(cap) <= known.limit:
        raise UserError(
            f"the space {space!r} allows {name} up to {cap!r}; give a number above 0 and up to {known.limit:g} "
            f"{known.unit}, true for {known.strongest:g}, or leave it out to forbid it"
        )
    return float(cap)


def _autoaugment_16() -> dict[str, float | None]:
    """AutoAugment's operations in its ranges."""
    others = ("invert", "cutout", "sample_pairing")
    names = [name for name, known in OPS.items() if known.wide is not None or name in others]
    return {name: OPS[name].strongest for name in names if name != "identity"}


#: Spaces by modality. Numbers outside ``natural`` are choices of this project, to be reviewed by a clinician; an own
#: space is a YAML file (:func:`load_space`).
SPACES: dict[str, OperationSpace] = {
    space.name: space
    for space in (
        OperationSpace(
            "natural",
            {**_autoaugment_16(), "horizontal_flip": None, "crop": 0.125},
            "photographs of objects: AutoAugment's operations in its ranges; upside down they are something else",
        ),
        OperationSpace(
            "radiograph",
            {
                **{"crop": 0.05, "translate_x": 0.05, "translate_y": 0.05, "rotate": 10, "zoom": 0.05, "elastic": 0.05},
                **{"contrast": 0.1, "brightness": 0.1, "gamma": 0.1, "noise": 0.02, "blur": 0.5},
            },
            "chest radiographs: left and right carry meaning, grey levels are densities, a small spot is a finding",
        ),
        OperationSpace(
            "histology",
            {
                **{"horizontal_flip": None, "vertical_flip": None, "quarter_turn": None, "crop": 0.1},
                **{"translate_x": 0.1, "translate_y": 0.1, "zoom": 0.1, "elastic": 0.02},
                **{"contrast": 0.2, "brightness": 0.2, "gamma": 0.1, "noise": 0.02, "blur": 0.5},
            },
            "stained sections: they have no up or left, their colours are the stain's; cutout may erase what is rare",
        ),
        OperationSpace(
            "dermoscopy",
            {
                **{"horizontal_flip": None, "vertical_flip": None, "quarter_turn": None, "rotate": 180, "crop": 0.1},
                **{"translate_x": 0.1, "translate_y": 0.1, "zoom": 0.1},
                **{"contrast": 0.2, "brightness": 0.2, "gamma": 0.1, "noise": 0.02, "blur": 0.5},
            },
            "skin lesions: they have no up or left, but outline and colours carry the diagnosis; cutout may erase them",
        ),
    )
}


def load_space(spec: str | Path | Mapping[str, Any] | OperationSpace) -> OperationSpace:
    """A space by its name, from a YAML file, or from what such a file holds.

    A file, or a mapping, lists the allowed operations with the strongest strength of each in its unit; ``true`` is the
    operation's own range, and ``false`` takes away what ``extends`` brought::

        name: knee
        reason: left and right knees are mirror images
        extends: radiograph
        operations: {rotate: 15, horizontal_flip: true, elastic: false}

    Args:
        spec: A name of :data:`SPACES`, a path, a mapping with ``operations`` and, if wanted, ``name``, ``reason`` and
            ``extends`` (a name, a path or a mapping again), or a space, which is returned.

    Raises:
        UserError: If there is no such space or file, or it does not hold a space.
    """
    return _load(spec, ())


def _load(spec: Any, files: tuple[Path, ...]) -> OperationSpace:
    """See :func:`load_space`; ``files`` are those that led here, each of which extends the next one."""
    if isinstance(spec, OperationSpace):
        return spec
    if isinstance(spec, Mapping):
        return _from_mapping(spec, "the space", files)
    if isinstance(spec, str) and spec in SPACES:
        return SPACES[spec]
    if not isinstance(spec, str | Path):
        raise UserError(
            f"{spec!r} is no space of operations; give one of {', '.join(SPACES)}, or a YAML file or mapping with name "
            "and operations"
        )
    path = Path(spec)
    if path.resolve() in files:
        raise UserError(f"extends goes in a circle, back to {path}; let it name another space")
    if not path.is_file():
        close = get_close_matches(str(spec), SPACES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"no space of operations is called {str(spec)!r} and there is no such file; {hint}"
            f"known: {', '.join(SPACES)}; or give a YAML file with name and operations"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not a space of operations; it needs name and operations, such as {{rotate: 15}}")
    try:
        return _from_mapping({"name": path.stem, **content}, str(path), (*files, path.resolve()))
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _text(value: Any) -> str:
    """A text, also if a command line took it for YAML: ``lungs: left and right`` became a mapping, ``3`` a number."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return "" if value is None else str(value)


def _from_mapping(content: Mapping[str, Any], source: str, files: tuple[Path, ...]) -> OperationSpace:
    known = ("name", "operations", "reason", "extends")
    check_keys(content, known, source)
    name, reason = _text(content.get("name", "own")), _text(content.get("reason"))
    listed = content.get("operations", {})
    if not isinstance(listed, Mapping):
        raise UserError(f"{source} has operations {listed!r}; it needs a mapping such as {{rotate: 15, invert: true}}")
    extended = _load(content["extends"], files) if content.get("extends") is not None else None
    caps: dict[str, Any] = dict(extended.caps) if extended else {}
    for key, cap in listed.items():
        if operation(str(key)) and cap is False:
            caps.pop(str(key), None)
        else:
            caps[str(key)] = cap
    if extended and extended.reason and not reason:
        reason = f"extends {extended.name}: {extended.reason}"
    return OperationSpace(name, caps, reason)
