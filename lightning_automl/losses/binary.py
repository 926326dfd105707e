"""Binary cross-entropy: one yes-or-no question a class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.losses.targets import check_label_smoothing, class_weight, soft_targets


class BinaryCrossEntropy(nn.Module):
    """One sigmoid a class, each against all other classes.

    Wightman, Touvron and Jégou, *ResNet strikes back*, 2021, https://arxiv.org/abs/2110.00476 (section 3). The terms of
    the classes are added up, not averaged as there, so that gradients have the size of cross-entropy's and a learning
    rate does not depend on the number of classes.

    A network with **one** logit does for two classes: it is the log-odds of class 1.

    Args:
        weight: One number a class; an image counts as much as its label says (soft labels: their mean), and the loss is
            the weighted mean over images.
        label_smoothing: Share of the uniform distribution in the targets, in [0, 1].

    Raises:
        UserError: If ``label_smoothing`` is outside [0, 1].
    """

    weight: Tensor | None

    def __init__(self, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", class_weight(weight))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            logits: ``(batch, classes)``, or ``(batch, 1)`` for two classes.
            targets: Labels ``(batch,)`` int64, or probabilities ``(batch, classes)``.
        """
        classes = max(logits.shape[1], 2)
        soft = soft_targets(targets, classes, self.label_smoothing)
        questions = soft[:, 1:] if logits.shape[1] == 1 else soft
        losses = F.binary_cross_entropy_with_logits(logits, questions.to(logits.dtype), reduction="none").sum(1)
        if self.weight is None:
            return losses.mean()
        counts = soft_targets(targets, classes).to(self.weight.dtype) @ self.weight
        return (losses * counts).sum() / counts.sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities ``(batch, classes)`` that sum to one: the sigmoids divided by their sum."""
        if logits.shape[1] == 1:
            return torch.cat([-logits, logits], 1).sigmoid()
        return F.logsigmoid(logits).softmax(1)  # the same, also where all sigmoids are zero
