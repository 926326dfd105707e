"""Augmentation policies as something to search: parameters for any sampler of Optuna, and what becomes of the best."""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_automl.augment.policy import Policy, Step
from lightning_automl.augment.spaces import OperationSpace, load_space
from lightning_automl.rundir import UserError
from lightning_automl.search.spaces import Parameter, Space


def space_size(operations: int, probabilities: int, magnitudes: int, slots: int) -> int:
    """Number of policies: each slot has its operation, probability and magnitude.

    Cubuk et al., *AutoAugment*, CVPR 2019, https://arxiv.org/abs/1805.09501 (section 3.1): 16 operations, 11
    probabilities, 10 magnitudes and 5 sub-policies of 2 operations make 2.9e32.
    """
    size: int = (operations * probabilities * magnitudes) ** slots
    return size


class PolicySpace:
    """All policies of some sub-policies of some operations each, as parameters by name.

    ``2.0.operation`` is the operation of the first step of the third sub-policy; beside it are ``2.0.probability`` and
    ``2.0.magnitude``. Operations without a strength have a magnitude too, which does not count.

    Args:
        space: What may be done, and what magnitudes are shares of.
        operations: Those to choose from; all that ``space`` allows but those of ``base_augment`` when left out.
        sub_policies: How many.
        length: Steps of each.
        probabilities: Number of values that a probability can have, evenly from 0 to 1; None: any.
        magnitudes: Number of values that a magnitude can have, likewise.

    Attributes:
        operations: The names of the operations to choose from.

    Raises:
        UserError: If an operation is unknown or forbidden in ``space``, or a number is too small.
    """

    def __init__(
        self,
        space: OperationSpace,
        operations: Sequence[str] | None = None,
        sub_policies: int = 5,
        length: int = 2,
        probabilities: int | None = None,
        magnitudes: int | None = None,
    ) -> None:
        chosen = space.searched() if operations is None else tuple(operations)
        if not chosen:
            what = "operations is empty" if operations is not None else f"the space {space.name!r} has only base ones"
            raise UserError(f"there is no operation to search: {what}; name some")
        for place, name in enumerate(chosen):
            space.cap(name)  # refuses what is unknown or forbidden
            if name in chosen[:place]:
                raise UserError(f"operations has {name} twice; name each once")
        for what, number in (("sub_policies", sub_policies), ("length", length)):
            if number < 1:
                raise UserError(f"{what} is {number}; it must be 1 or more")
        for what, levels in (("probabilities", probabilities), ("magnitudes", magnitudes)):
            if levels is not None and levels < 2:
                raise UserError(f"{what} is {levels}; give 2 values or more, or null for any value in [0, 1]")
        self.space = space
        self.operations = chosen
        self.sub_policies = sub_policies
        self.length = length
        self.probabilities = probabilities
        self.magnitudes = magnitudes

    @property
    def size(self) -> int | None:
        """Number of policies; None where probabilities or magnitudes may be any number."""
        if self.probabilities is None or self.magnitudes is None:
            return None
        slots = self.sub_policies * self.length
        return space_size(len(self.operations), self.probabilities, self.magnitudes, slots)

    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna is asked for, by name; of evenly spaced values their number, from 0."""
        of_slot: dict[str, BaseDistribution] = {
            "operation": CategoricalDistribution(self.operations),
            "probability": _distribution(self.probabilities),
            "magnitude": _distribution(self.magnitudes),
        }
        return {f"{slot}.{what}": each for slot in self._slots() for what, each in of_slot.items()}

    def as_space(self) -> Space:
        """The same for :func:`lightning_automl.search.study.search`."""
        return Space(
            {
                name: Parameter(
                    name,
                    name,
                    distribution,
                    distribution.choices if isinstance(distribution, CategoricalDistribution) else (),
                )
                for name, distribution in self.distributions().items()
            }
        )

    def policy(self, values: Mapping[str, Any]) -> Policy:
        """The policy of values by name, as the study has them."""
        steps = [
            Step(
                values[f"{slot}.operation"],
                _share(values[f"{slot}.probability"], self.probabilities),
                _share(values[f"{slot}.magnitude"], self.magnitudes),
            )
            for slot in self._slots()
        ]
        starts = range(0, len(steps), self.length)
        return Policy([steps[start : start + self.length] for start in starts], self.space)

    def describe(self) -> dict[str, Any]:
        """What makes two of them the same, as JSON."""
        sizes = ("sub_policies", "length", "probabilities", "magnitudes")
        described = {name: getattr(self, name) for name in sizes}
        return {"space": self.space.to_dict(), "operations": list(self.operations), **described}

    def _slots(self) -> list[str]:
        return [f"{i}.{j}" for i in range(self.sub_policies) for j in range(self.length)]


def _distribution(levels: int | None) -> FloatDistribution | IntDistribution:
    return FloatDistribution(0.0, 1.0) if levels is None else IntDistribution(0, levels - 1)


def _share(value: float, levels: int | None) -> float:
    return float(value) if levels is None else value / (levels - 1)


@dataclass(frozen=True)
class Scored:
    """A policy of a search, and what came of it.

    Args:
        number: From 0, in the order of the search.
        values: Of the policy, by name of :class:`PolicySpace`.
        value: What it was given; None if it failed.
        seconds: That it took.
        reason: Why it failed, "" if it did not.
    """

    number: int
    values: dict[str, Any]
    value: float | None
    seconds: float = 0.0
    reason: str = ""

    @property
    def state(self) -> str:
        """``COMPLETE`` or ``FAIL``, as in a study."""
        return "FAIL" if self.value is None else "COMPLETE"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; ``Scored(**…)`` reads it."""
        return asdict(self)


def best_of(
    scored: Sequence[Scored], keep: int, direction: Literal["minimize", "maximize"] = "minimize"
) -> list[Scored]:
    """The ``keep`` best that have a value, best first, of equal ones the earlier first."""
    sign = 1 if direction == "minimize" else -1
    found = [(sign * each.value, each.number, each) for each in scored if each.value is not None]
    return [each for _, _, each in sorted(found, key=lambda item: item[:2])[:keep]]


#: Steps that are done more seldom are not kept; AutoAugment's probabilities, in steps of 0.1, would be 0 there.
LEAST_PROBABILITY = 0.05


def merged(policies: PolicySpace, kept: Sequence[Scored]) -> Policy:
    """The sub-policies of all of these, each once, in order, without steps that are hardly ever done.

    The papers keep those too. But a policy is not kept for the sake of what it does to one image in fifty: such steps
    come in with the others unexamined, and would be the way by which a harmful operation gets into what is found.

    Raises:
        UserError: If there is none.
    """
    if not kept:
        raise UserError("no policy was scored, so there is none to keep; see why the trials failed")
    found = [
        [step for step in steps if step.probability >= LEAST_PROBABILITY]
        for each in kept
        for steps in policies.policy(each.values).sub_policies
    ]
    found = [steps for steps in found if steps]
    return Policy(found, policies.space).merge() if found else Policy([[Step("identity")]], policies.space)


class PolicyMethod(ABC):
    """A way to search for an augmentation policy; what ``method:`` of a search config names.

    Args:
        space: What may be done: a name, a YAML file or its content, as of an image policy.
        operations: Those to choose from; all of the space but those of ``base_augment``, and those that do nothing to
            the images at hand, when left out.
        keep: How many of the best policies are merged.
        sub_policies: Of each policy that is tried.
        length: Steps of each sub-policy.
        probabilities: Number of values that a probability can have; None: any.
        magnitudes: Number of values that a magnitude can have; None: any.

    Raises:
        UserError: If an operation is unknown or forbidden in the space, or a number is too small.
    """

    #: Whether small values are good.
    direction: Literal["minimize", "maximize"]

    def __init__(
        self,
        space: str | dict[str, Any] | OperationSpace,
        operations: list[str] | None,
        keep: int,
        sub_policies: int,
        length: int,
        probabilities: int | None,
        magnitudes: int | None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}; it must be 1 or more")
        self.space = load_space(space)
        self.operations = operations
        self.keep = keep
        self._levels = probabilities, magnitudes
        self._sizes = sub_policies, length
        self.policies()  # refuses what cannot be

    def policies(self, channels: int = 3, image_size: tuple[int, int] = (1, 1)) -> PolicySpace:
        """What is gone through for images of so many channels, of this height and width.

        When the operations were not named, those are left out that these images do not allow or that do nothing to
        them: a search would otherwise keep them for not doing harm.
        """
        operations = self.operations
        if operations is None:
            useless = {"color"} if channels != 3 else set()
            useless |= {"quarter_turn"} if image_size[0] != image_size[1] else set()
            operations = [name for name in self.space.searched() if name not in useless]
        return PolicySpace(self.space, operations, *self._sizes, *self._levels)

    def check(self, trials: int, folds: int) -> None:
        """Refuse a number of trials or folds that the method cannot work with.

        Raises:
            UserError: If ``keep`` is more than ``trials``, or there are too few folds.
        """
        if trials < 1:
            raise UserError(f"trials is {trials}; it must be 1 or more")
        if self.keep > trials:
            raise UserError(f"keep is {self.keep}, of {trials} trials; give keep of {trials} or less, or more trials")

    def entry(self, scored: Scored) -> dict[str, Any]:
        """Value and sub-policies of a policy that is kept, as JSON can hold them."""
        policy = self.policies().policy(scored.values)
        return {
            "value": scored.value,
            "sub_policies": [[step.to_dict() for step in steps] for steps in policy.sub_policies],
        }

    def arguments(self) -> dict[str, Any]:
        """What the constructor takes, as JSON can hold it."""
        sub_policies, length = self._sizes
        return {
            "space": self.space.to_dict(),
            "operations": self.operations,
            "keep": self.keep,
            "sub_policies": sub_policies,
            "length": length,
        }
