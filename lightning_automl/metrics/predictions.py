"""What scores and calibration are computed from: one row of scores and one label an image."""

import numpy as np
from numpy.typing import NDArray

from lightning_automl.rundir import UserError

Scores = NDArray[np.floating]
Labels = NDArray[np.integer]


def check_predictions(scores: Scores, labels: Labels, name: str = "probabilities") -> None:
    """Refuse scores ``(images, classes)`` and labels ``(images,)`` that do not belong together.

    Args:
        scores: What has to have two dimensions and at least one row.
        labels: What has to have one value a row, in [0, classes).
        name: What the scores are called in the message.

    Raises:
        UserError: If they do not belong together.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.size:
        raise UserError(
            f"{name} have shape {scores.shape} and labels {labels.shape}; "
            "give (images, classes) and (images,), of one image or more"
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise UserError(
            f"labels are in [{labels.min()}, {labels.max()}], but {name} have {scores.shape[1]} classes; "
            "give labels from 0 on, each below the number of classes"
        )
    if not np.isfinite(scores).all():
        raise UserError(f"some {name} are not finite; give those of a run that did not diverge")
