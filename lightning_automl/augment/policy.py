"""Policies as data: which operations are done to an image, how probably and how strongly; drawn anew for each image."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_automl.augment import engine
from lightning_automl.augment.engine import Plan
from lightning_automl.augment.ops import OPS, check_keys, operation
from lightning_automl.augment.spaces import OperationSpace, load_space
from lightning_automl.rundir import UserError, write_json

#: Of the files that :func:`save_policy` writes.
VERSION = 1

#: Places of the operations in a plan.
PLACES = {name: place for place, name in enumerate(OPS)}

_SLACK = 1 + 1e-9  # of strengths that are products of rounded numbers


@dataclass(frozen=True)
class Step:
    """One operation of a sub-policy.

    Args:
        operation: A name of :data:`~lightning_automl.augment.OPS`.
        probability: Of doing it, in [0, 1].
        magnitude: Share, in [0, 1], of the strongest that the policy's space allows; 0 is the identity. Does not count
            for operations without a strength.
        sign: Direction of an operation that goes both ways; 0: drawn for each image.

    Raises:
        UserError: If there is no such operation, or a number is out of its range.
    """

    operation: str
    probability: float = 1.0
    magnitude: float = 1.0
    sign: Literal[-1, 0, 1] = 0

    def __post_init__(self) -> None:
        if not isinstance(self.operation, str):
            raise UserError(f"the operation of a step is {self.operation!r}; give a name, such as rotate")
        known = operation(self.operation)
        for name, value in (("probability", self.probability), ("magnitude", self.magnitude)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise UserError(f"{self.operation} has the {name} {value!r}; give a number in [0, 1]")
            object.__setattr__(self, name, float(value))
        if self.sign not in (-1, 0, 1) or (self.sign and not known.signed):
            only = "-1, 0 or 1" if known.signed else "0: it goes one way only"
            raise UserError(f"{self.operation} has the sign {self.sign!r}; give {only}")
        object.__setattr__(self, "sign", int(self.sign))

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; the sign only where it is not drawn."""
        return {key: value for key, value in asdict(self).items() if key != "sign" or value}


class ImagePolicy(v2.Transform, ABC):  # type: ignore[misc]
    """Augments images, each with its own draw: base of all policies.

    Takes uint8 tensors, or float ones in [0, 1], ``(batch, channels, height, width)`` or ``(channels, height, width)``,
    on any device, PIL images and ``tv_tensors.Image``, alone or in a sample with one image, as transforms of
    torchvision v2 do; the rest of the sample passes. As with torchvision's ``AutoAugment``, boxes, masks and key points
    are refused, since they would not move with the image.

    All decisions are drawn on the CPU (:meth:`draw`), by a generator or by torch's default one, which workers of a
    loader and the data modules seed; so the policy never waits for a device.

    Args:
        space: What may be done: a name (``natural``, ``radiograph``, ``histology``, ``dermoscopy``), a YAML file, or
            its content (:func:`~lightning_automl.augment.load_space`); None: no limits but the operations' own ranges.
        interpolation: How geometric operations read pixels.
        fill: What comes in from outside: a level (0 to 255 for uint8, 0 to 1 for float images), or one a channel; 0 if
            None.
    """

    def __init__(
        self,
        space: str | dict[str, Any] | OperationSpace | None = None,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | list[float] | None = None,
    ) -> None:
        super().__init__()
        if interpolation not in ("nearest", "bilinear"):
            raise UserError(f"unknown interpolation {interpolation!r}; known: nearest, bilinear")
        self.space = None if space is None else load_space(space)
        self.interpolation: Literal["nearest", "bilinear"] = interpolation
        self.fill = _fill(fill)

    @abstractmethod
    def draw(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Plan:
        """What to do to each image of a batch.

        Args:
            count: Number of images.
            channels: Of each image.
            size: Height and width, in pixels.
            generator: On the CPU; None: torch's default one.

        Raises:
            RuntimeError: If the generator is not on the CPU.
        """

    @abstractmethod
    def strongest(self) -> dict[str, float | None]:
        """The operations that may happen, with the largest strength of each in its unit; None: it has no strength."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What the constructor takes, as JSON can hold it."""

    def operations(self) -> set[str]:
        """Names of all operations that may happen."""
        return set(self.strongest())

    def apply(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment images, each with its own draw.

        Args:
            images: uint8, or float in [0, 1]: ``(batch, channels, height, width)`` or one image
                ``(channels, height, width)``; they are not changed.
            generator: On the CPU; None: torch's default one.

        Returns:
            Images of the same shape, dtype, device and memory format.

        Raises:
            UserError: If the images do not fit; of a wrong dtype it is an :class:`ImageTypeError`.
            RuntimeError: If the generator is not on the CPU.
        """
        if images.ndim not in (3, 4):
            raise UserError(
                f"images have the shape {tuple(images.shape)}; policies take (batch, channels, height, width), or one "
                "image (channels, height, width)"
            )
        channels, height, width = images.shape[-3:]
        if height != width and self._turns:  # in every batch, not only in those where one is drawn
            raise UserError(
                f"quarter_turn needs square images and these have {height} x {width} pixels; leave it out of the "
                "policy or its space, or use rotate"
            )
        count = 1 if images.ndim == 3 else len(images)
        plan = self.draw(count, channels, (height, width), generator)
        return engine.apply(images, plan, interpolation=self.interpolation, fill=self.filling(images))

    @cached_property
    def _turns(self) -> bool:
        return "quarter_turn" in self.operations()

    def filling(self, images: Tensor) -> float | list[float] | None:
        """What comes in from outside of these images."""
        return self.fill

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse what would not move with the image."""
        for value in flat_inputs:
            if isinstance(value, tv_tensors.BoundingBoxes | tv_tensors.Mask | tv_tensors.KeyPoints | tv_tensors.Video):
                raise TypeError(
                    f"Inputs of type {type(value).__name__} are not supported by {type(self).__name__}(): "
                    "they would stay where they are while the image moves; give the image and its label only"
                )

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Check that there is one image; nothing is drawn yet."""
        if len(flat_inputs) != 1:
            raise TypeError(f"{type(self).__name__}() takes samples with one image and found {len(flat_inputs)}")
        return {}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Augment the image of a sample; what comes out is of the same kind."""
        if isinstance(inpt, PIL.Image.Image):
            if inpt.mode not in ("L", "RGB"):
                raise TypeError(
                    f"a PIL image of mode {inpt.mode} was given; policies take the modes L and RGB: use convert()"
                )
            pixels = torch.from_numpy(np.array(inpt))  # a copy, since PIL's memory cannot be written to
            image = pixels[None] if inpt.mode == "L" else pixels.permute(2, 0, 1)
            result = self.apply(image)
            return PIL.Image.fromarray((result[0] if inpt.mode == "L" else result.permute(1, 2, 0)).numpy())
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(self.apply(inpt.as_subclass(Tensor)), like=inpt)
        return self.apply(inpt)

    def extra_repr(self) -> str:
        """The arguments, shortened."""
        return ", ".join(
            f"{key}={value['name'] if key == 'space' else value!r}"
            for key, value in self.arguments().items()
            if value is not None
        )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, ImagePolicy) and self._same() == other._same()

    def __hash__(self) -> int:
        arguments, space = self._same()
        return hash((type(self).__name__, json.dumps(arguments, sort_keys=True), space))

    def _same(self) -> tuple[dict[str, Any], OperationSpace | None]:
        """What equal policies have in common: the words about a space are not compared."""
        return {key: value for key, value in self.arguments().items() if key != "space"}, self.space

    def _common(self) -> dict[str, Any]:
        space = self.space.to_dict() if self.space else None
        return {"space": space, "interpolation": self.interpolation, "fill": self.fill}


class Policy(ImagePolicy):
    """Sub-policies: for each image one is drawn uniformly, and its steps are tried in order.

    Cubuk et al., *AutoAugment*, CVPR 2019, https://arxiv.org/abs/1805.09501 (section 3).

    Args:
        sub_policies: Lists of steps, or of mappings with ``operation``, ``probability``, ``magnitude`` (and ``sign``).
        space: What the magnitudes are shares of, and the only operations that steps may name; without one magnitude 1
            is the strongest of AutoAugment's range. See :class:`ImagePolicy`.
        interpolation: As :class:`ImagePolicy`.
        fill: As :class:`ImagePolicy`.

    Raises:
        UserError: If there is no step, a step is wrong, or the space forbids its operation.
    """

    def __init__(
        self,
        sub_policies: Sequence[Sequence[Step | dict[str, Any]]],
        space: str | dict[str, Any] | OperationSpace | None = None,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
        fill: float | list[float] | None = None,
    ) -> None:
        super().__init__(space, interpolation, fill)
        self.sub_policies = tuple(tuple(_step(step) for step in steps) for steps in _lists(sub_policies))
        if not self.sub_policies or not all(self.sub_policies):
            what = "a sub-policy without steps" if self.sub_policies else "no sub-policies"
            raise UserError(f"the policy has {what}; Identity() is the policy that does nothing")
        length = max(len(steps) for steps in self.sub_policies)
        shape = (len(self.sub_policies), length)
        # Tables by (sub-policy, step): what drawing looks up.
        self._places: NDArray[np.int64] = np.full(shape, PLACES["identity"])
        self._probabilities: NDArray[np.float64] = np.zeros(shape)
        self._strengths: NDArray[np.float64] = np.zeros(shape)
        self._mirrored: NDArray[np.float64] = np.zeros(shape)  # probability of the other sign
        for i, steps in enumerate(self.sub_policies):
            for j, step in enumerate(steps):
                self._places[i, j] = PLACES[step.operation]
                self._probabilities[i, j] = step.probability
                self._strengths[i, j] = (self.strength(step) or 0.0) * (step.sign or 1)
                self._mirrored[i, j] = 0.5 if OPS[step.operation].signed and not step.sign else 0

    @staticmethod
    def identity() -> "Policy":
        """The policy with one step, which changes nothing."""
        return Policy([[Step("identity", 1.0, 0.0)]])

    def strength(self, step: Step) -> float | None:
        """How strong a step is, in its operation's unit and without its sign; None if it has no strength."""
        cap = OPS[step.operation].strongest if self.space is None else self.space.cap(step.operation)
        return None if cap is None else step.magnitude * cap

    def draw(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Plan:
        """For each image a sub-policy, which of its steps are done, and their signs; see :meth:`ImagePolicy.draw`."""
        drawn = uniform(count, 1 + 3 * self._places.shape[1], generator)
        return self._plan((drawn[:, 0] * len(self)).astype(np.int64), drawn[:, 1:])

    def draw_each(self, count: int, generator: torch.Generator | None = None) -> Plan:
        """What each sub-policy does to each image, for searches, which look at all of them.

        Args:
            count: Number of images.
            generator: On the CPU; None: torch's default one.

        Returns:
            For ``(sub-policies * images)``: all images with the first sub-policy, then with the second one.

        Raises:
            RuntimeError: If the generator is not on the CPU.
        """
        chosen = np.arange(len(self)).repeat(count)
        return self._plan(chosen, uniform(len(chosen), 3 * self._places.shape[1], generator))

    def _plan(self, chosen: NDArray[np.int64], drawn: NDArray[np.float64]) -> Plan:
        applied, signs, seeds = np.split(drawn, 3, axis=1)
        places = np.where(applied < self._probabilities[chosen], self._places[chosen], PLACES["identity"])
        strengths = np.where(signs < self._mirrored[chosen], -self._strengths[chosen], self._strengths[chosen])
        return plan_of(places, strengths, seeds)

    def strongest(self) -> dict[str, float | None]:
        """See :meth:`ImagePolicy.strongest`."""
        return _largest((step.operation, self.strength(step)) for steps in self.sub_policies for step in steps)

    def arguments(self) -> dict[str, Any]:
        """See :meth:`ImagePolicy.arguments`."""
        return {"sub_policies": [[step.to_dict() for step in steps] for steps in self.sub_policies], **self._common()}

    def extra_repr(self) -> str:
        """The number of sub-policies instead of all of them."""
        space = f", space={self.space.name}" if self.space else ""
        return f"{len(self)} {'sub-policy' if len(self) == 1 else 'sub-policies'}{space}"

    def merge(self, *others: "Policy") -> "Policy":
        """The union of policies, in order, each sub-policy once.

        Two sub-policies are the same when they do the same: magnitudes of operations without a strength do not count.

        Raises:
            UserError: If the policies differ in space, interpolation or fill.
        """
        kept: dict[tuple[Any, ...], list[Step]] = {}
        for policy in (self, *others):
            for what in ("space", "interpolation", "fill"):
                own, others_own = getattr(self, what), getattr(policy, what)
                if own != others_own:
                    own, others_own = (getattr(value, "name", value) for value in (own, others_own))
                    raise UserError(
                        f"policies of another {what} cannot be merged: {own!r} and {others_own!r}; make it the same"
                    )
            for steps in policy.restated(self.space):
                kept.setdefault(tuple(_meaning(step) for step in steps), steps)
        return Policy(list(kept.values()), self.space, self.interpolation, self.fill)

    def restated(self, space: OperationSpace | None) -> list[list[Step]]:
        """The same sub-policies, with magnitudes that are shares of what a space allows.

        Raises:
            UserError: If the policy does more than the space allows; the operation is named.
        """
        if space is not None:
            check_space(self, space)
        caps = {name: OPS[name].strongest if space is None else space.cap(name) for name in self.operations()}

        def same(step: Step) -> Step:
            strength, cap = self.strength(step), caps[step.operation]
            if strength is None or cap is None or strength == step.magnitude * cap:
                return step
            return replace(step, magnitude=min(1.0, strength / cap))

        return [[same(step) for step in steps] for steps in self.sub_policies]

    def __add__(self, other: "Policy") -> "Policy":
        return self.merge(other) if isinstance(other, Policy) else NotImplemented

    def __len__(self) -> int:
        return len(self.sub_policies)


class Identity(ImagePolicy):
    """Changes nothing: the policy to compare others with.

    Args:
        space: As :class:`ImagePolicy`: what ``base_augment`` of a data module has to obey.
    """

    def __init__(self, space: str | dict[str, Any] | OperationSpace | None = None) -> None:
        super().__init__(space)

    def draw(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Plan:
        """A plan without operations; nothing is drawn."""
        nothing = np.zeros((count, 0))
        return plan_of(nothing.astype(np.int64), nothing, nothing)

    def apply(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images themselves."""
        return images

    def strongest(self) -> dict[str, float | None]:
        """Nothing happens."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """See :meth:`ImagePolicy.arguments`."""
        return {"space": self.space.to_dict() if self.space else None}


def uniform(rows: int, columns: int, generator: torch.Generator | None) -> NDArray[np.float64]:
    """Numbers ``(rows, columns)`` in [0, 1) for the decisions of a batch, a row an image, by one call.

    Raises:
        RuntimeError: If the generator is not on the CPU.
    """
    if generator is not None and generator.device.type != "cpu":
        raise RuntimeError(f"the generator is on {generator.device}; plans are drawn on the CPU, by torch.Generator()")
    drawn: NDArray[np.float64] = torch.rand(rows, columns, dtype=torch.float64, generator=generator).numpy()
    return drawn


def plan_of(places: NDArray[np.int64], strengths: NDArray[np.float64], seeds: NDArray[np.float64]) -> Plan:
    """A plan of arrays ``(images, length)``; the seeds are still uniform in [0, 1)."""
    whole = (seeds * 2.0**31).astype(np.int64)
    return Plan(torch.from_numpy(places), torch.from_numpy(strengths), torch.from_numpy(whole))


def check_space(policy: ImagePolicy, space: str | dict[str, Any] | OperationSpace) -> None:
    """Raise if a policy may do what a space forbids.

    Raises:
        UserError: If an operation is forbidden, or may be stronger than allowed; it is named.
    """
    allowed = load_space(space)
    for name, strength in policy.strongest().items():
        cap = allowed.cap(name)
        if cap is not None and strength is not None and strength > cap * _SLACK:
            raise UserError(
                f"{name} goes up to {strength:.4g} {OPS[name].unit} in this {type(policy).__name__}, and the space "
                f"{allowed.name!r} allows {cap:.4g}; give the policy this space, or lower the magnitude"
            )


def policy_to_dict(policy: ImagePolicy) -> dict[str, Any]:
    """A policy as JSON can hold it: version, name of the class, arguments.

    Raises:
        UserError: If the class is not one of this package: a file could not name it.
    """
    known = _classes()
    if known.get(type(policy).__name__) is not type(policy):
        raise UserError(
            f"a {type(policy).__name__} cannot be written to a policy file; those that can: {', '.join(known)}"
        )
    return {"version": VERSION, "policy": type(policy).__name__, "arguments": policy.arguments()}


def policy_from_dict(content: Any) -> ImagePolicy:
    """The policy that :func:`policy_to_dict` was given.

    Raises:
        UserError: If it is of another version, or does not hold a policy.
    """
    if not isinstance(content, Mapping) or "version" not in content:
        raise UserError('no policy; it needs {"version": 1, "policy": name of a class, "arguments": {…}}')
    if content["version"] != VERSION or isinstance(content["version"], bool):
        raise UserError(
            f"a policy of version {content['version']!r} and this release reads version {VERSION}; "
            "read it with the release that wrote it"
        )
    parts = ("version", "policy", "arguments")
    for key in content:
        if key not in parts:
            raise UserError(f"a policy with the unknown key {key!r}; known: {', '.join(parts)}")
    known = _classes()
    name, arguments = content.get("policy"), content.get("arguments", {})
    if not isinstance(name, str) or name not in known:
        close = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown policy {name!r}; {hint}known: {', '.join(known)}")
    if not isinstance(arguments, Mapping):
        raise UserError(f"the arguments of {name} are {arguments!r}; they are a mapping by name")
    try:
        return known[name](**arguments)
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"arguments that {name} does not take: {error}") from error


def save_policy(policy: ImagePolicy, path: str | Path) -> None:
    """Write a policy as JSON, atomically.

    Raises:
        UserError: If the class is not one of this package.
    """
    write_json(Path(path), policy_to_dict(policy))


def load_policy(path: str | Path) -> ImagePolicy:
    """Read what :func:`save_policy` wrote.

    Raises:
        UserError: If the file is missing, no JSON, of another version or holds no policy; the file is named.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the policy file in it, {path / 'policy.json'}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no policy file {path}; a search writes one, as does save_policy") from error
    except OSError as error:
        raise UserError(f"the policy file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"the policy file {path} is no JSON ({error}); restore it or search again") from error
    try:
        return policy_from_dict(content)
    except UserError as error:
        raise UserError(f"the policy file {path} holds {error}") from error


def _classes() -> dict[str, type[ImagePolicy]]:
    """Policies that a file can name, by name: all of this package."""
    found: dict[str, type[ImagePolicy]] = {}
    waiting = [ImagePolicy]
    while waiting:
        below = waiting.pop(0).__subclasses__()
        own = [kind for kind in below if kind.__module__.startswith(f"{__package__}.")]
        found |= {kind.__name__: kind for kind in own if not kind.__name__.startswith("_")}
        waiting += own
    return found


def _fill(fill: Any) -> float | list[float] | None:
    """As JSON can hold it; levels of float images are below those of uint8 images, so that they are checked later."""
    if fill is None:
        return None
    several = isinstance(fill, list | tuple)
    values = fill if several else [fill]
    if not values or not all(
        isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 255 for value in values
    ):
        raise UserError(f"fill is {fill!r}; give a level from 0 to 255, or a list with one for each channel")
    levels = [value if isinstance(value, int) else float(value) for value in values]  # PIL takes whole ones only
    return levels if several else levels[0]


def _lists(sub_policies: Any) -> Sequence[Sequence[Any]]:
    def listed(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str)

    if not listed(sub_policies) or not all(listed(steps) for steps in sub_policies):
        raise UserError("sub_policies is not a list of lists of steps; give [[{operation: rotate}, …], …]")
    return sub_policies  # type: ignore[no-any-return]


def _step(value: Any) -> Step:
    if isinstance(value, Step):
        return value
    if not isinstance(value, Mapping) or "operation" not in value:
        raise UserError(f"{value!r} is no step; it needs operation, and may have probability, magnitude and sign")
    known = ("operation", "probability", "magnitude", "sign")
    check_keys(value, known, "a step")
    return Step(**value)


def _meaning(step: Step) -> tuple[Any, ...]:
    counts = OPS[step.operation].strongest is not None
    return step.operation, step.probability, step.magnitude if counts else None, step.sign


def _largest(strengths: Any) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name, strength in strengths:
        before = result.get(name)
        result[name] = strength if before is None or strength is None else max(before, strength)
    return result
