"""Focal loss: let well classified images count less."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_automl.losses.targets import check_label_smoothing, class_weight, soft_targets
from lightning_automl.rundir import UserError


class FocalLoss(nn.Module):
    """Cross-entropy of each class times ``(1 - probability) ** gamma``.

    Lin, Goyal, Girshick, He and Dollár, *Focal Loss for Dense Object Detection*, ICCV 2017,
    https://arxiv.org/abs/1708.02002 (equation 5, with ``weight`` as its alpha). The paper's is a loss of two classes;
    here the probability is the softmax's, and with soft labels each class's term has its own factor. With ``gamma=0``
    it is ``torch.nn.CrossEntropyLoss``, averages over weighted images included.

    Args:
        gamma: How strongly well classified images are left out of account, 0 or more.
        weight: One number a class.
        label_smoothing: Share of the uniform distribution in the targets, in [0, 1].

    Raises:
        UserError: If ``gamma`` is negative or ``label_smoothing`` outside [0, 1].
    """

    weight: Tensor | None

    def __init__(
        self, gamma: float = 2.0, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if gamma < 0:
            raise UserError(f"gamma is {gamma}; give 0 (cross-entropy) or more")
        check_label_smoothing(label_smoothing)
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", class_weight(weight))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            logits: ``(batch, classes)``.
            targets: Labels ``(batch,)`` int64, or probabilities ``(batch, classes)``.
        """
        log_probabilities = logits.log_softmax(1)
        losses = -soft_targets(targets, logits.shape[1], self.label_smoothing) * log_probabilities
        if self.gamma:
            # At probability one the derivative of a power below one is infinite; it stands before a zero.
            rest = (-log_probabilities.expm1()).clamp(min=torch.finfo(logits.dtype).eps)
            losses = losses * rest**self.gamma
        if self.weight is None:
            return losses.sum(1).mean()
        loss = (losses * self.weight).sum()
        # As in CrossEntropyLoss: the weights of the labels are averaged over, those of soft labels are not.
        return loss / (self.weight[targets].sum() if targets.ndim == 1 else len(targets))
