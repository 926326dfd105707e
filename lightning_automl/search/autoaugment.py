"""AutoAugment: try augmentation policies by training a small network with each."""

from typing import Any, Literal

from lightning_automl.augment.spaces import OperationSpace
from lightning_automl.search.policies import PolicyMethod


class AutoAugmentSearch(PolicyMethod):
    """Train a child network with each policy that a sampler proposes; merge the best.

    Cubuk et al., *AutoAugment*, CVPR 2019, https://arxiv.org/abs/1805.09501 (section 3). Policies have 11 probabilities
    and 10 magnitudes; a policy's reward is the validation accuracy of its child; the sub-policies of the best five make
    the policy that is found. The paper's sampler is a recurrent network; here it is any of Optuna's. A child is a run
    of the config with a small budget, so its epochs are those of the run that is searched for.

    Args:
        space: What may be done: a name, a YAML file or its content, as of an image policy.
        operations: Those to choose from; all of the space but those of ``base_augment``, and those that do nothing to
            the images at hand, when left out.
        keep: How many of the best policies are merged.
        sub_policies: Of each policy that is tried.
        length: Steps of each sub-policy.
        probabilities: Number of values that a probability can have, evenly from 0 to 1.
        magnitudes: Number of values that a magnitude can have, likewise.

    Raises:
        UserError: If an operation is unknown or forbidden in the space, or a number is too small.
    """

    direction: Literal["minimize", "maximize"] = "maximize"

    def __init__(
        self,
        space: str | dict[str, Any] | OperationSpace = "natural",
        operations: list[str] | None = None,
        keep: int = 5,
        sub_policies: int = 5,
        length: int = 2,
        probabilities: int = 11,
        magnitudes: int = 10,
    ) -> None:
        super().__init__(space, operations, keep, sub_policies, length, probabilities, magnitudes)

    def arguments(self) -> dict[str, Any]:
        """See :meth:`PolicyMethod.arguments`."""
        probabilities, magnitudes = self._levels
        return {**super().arguments(), "probabilities": probabilities, "magnitudes": magnitudes}
