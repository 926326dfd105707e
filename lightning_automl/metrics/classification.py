"""The metrics of a classifier, from the outputs of a whole epoch."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_f1_score,
)


def classification_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Accuracy, balanced accuracy, AUROC, F1 and calibration error.

    ``balanced_accuracy`` is the mean recall of the classes that occur in ``labels``; ``auroc`` the mean of one class
    against the rest over the classes for which it is defined; ``f1`` the mean over the classes that occur in ``labels``
    or are predicted; ``calibration_error`` the expected calibration error with 15 bins of equal width (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599, equation 3).

    Args:
        probabilities: ``(images, classes)``, rows summing to one.
        labels: ``(images,)`` int64.

    Returns:
        Scalars by name; ``auroc`` is NaN when no class has both an image of its own and one of another class.
    """
    classes = probabilities.shape[1]
    counts = labels.bincount(minlength=classes)
    recall = multiclass_accuracy(probabilities, labels, classes, average="none", validate_args=False)
    # Classes without a positive or a negative image have no AUROC; torchmetrics would warn and count them as zero.
    defined = (counts > 0) & (counts < len(labels))
    if defined.all():
        areas = multiclass_auroc(probabilities, labels, classes, average="none", validate_args=False)
    else:
        areas = torch.full_like(probabilities[0], torch.nan)
        for index in defined.nonzero()[:, 0].tolist():
            pair = torch.stack([1 - probabilities[:, index], probabilities[:, index]], 1)
            areas[index] = multiclass_auroc(pair, (labels == index).long(), 2, average="none", validate_args=False)[1]
    return {
        "accuracy": multiclass_accuracy(probabilities, labels, classes, average="micro", validate_args=False),
        "balanced_accuracy": recall[counts > 0].mean(),
        "auroc": areas[defined].mean(),
        "f1": multiclass_f1_score(probabilities, labels, classes, average="macro", validate_args=False),
        # torchmetrics 1.9 would put a confidence of exactly 1 into a sixteenth bin of its own.
        "calibration_error": multiclass_calibration_error(
            probabilities.clamp(max=1 - 2**-24), labels, classes, n_bins=15, validate_args=False
        ),
    }


class StageOutputs(Metric):
    """Keeps the logits and labels of an epoch, so that every metric can be had of all images at once.

    Nothing is computed, moved or waited for in a step, so that a training step costs two list appends. The states are
    joined over ranks, so that each metric, the loss included, is that of all images and not a mean over ranks.
    Memory: four bytes a class and image.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]
    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "labels", "losses"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Keep a batch: logits ``(batch, classes)``, labels ``(batch,)`` and the batch's mean loss."""
        self.logits.append(logits.detach().float())
        self.labels.append(labels)
        self.losses.append(loss.detach().float().expand(len(labels)))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits ``(images, classes)``, the labels and the mean of the losses weighted by batch size."""
        return _join(self.logits), _join(self.labels), _join(self.losses).mean()


def _join(parts: Tensor | list[Tensor]) -> Tensor:
    # torchmetrics joins a list itself when it gathers the states of several ranks.
    return parts if isinstance(parts, Tensor) else torch.cat(parts)
