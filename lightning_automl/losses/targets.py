"""Labels as the losses need them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_automl.rundir import UserError


def soft_targets(targets: Tensor, classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Turn labels into probabilities, mixed with the uniform distribution.

    Szegedy et al. 2016, https://arxiv.org/abs/1512.00567 (section 7): ``(1 - e) * target + e / classes``.

    Args:
        targets: Labels ``(batch,)`` int64, or probabilities ``(batch, classes)``.
        classes: Number of classes.
        label_smoothing: Share ``e`` of the uniform distribution, in [0, 1].

    Returns:
        Probabilities ``(batch, classes)``.
    """
    soft = F.one_hot(targets, classes).float() if targets.ndim == 1 else targets
    return (1 - label_smoothing) * soft + label_smoothing / classes


def class_weight(weight: Sequence[float] | Tensor | None) -> Tensor | None:
    """One weight a class as a float tensor ``(classes,)``, or none."""
    return None if weight is None else torch.as_tensor(weight, dtype=torch.float32)


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise a UserError if the share is outside [0, 1]."""
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"label_smoothing is {label_smoothing}; it is a share in [0, 1]")
