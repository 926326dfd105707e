"""Two classes: rates at a threshold, and what a finding means where the disease is rarer."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_automl.rundir import UserError


class Rates(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of.

    ``recall`` is the sensitivity: of class 1, what was found. ``precision``: of what was found, class 1.
    ``specificity``: of class 0, what was left alone. ``balanced_accuracy``: the mean of recall and specificity.
    """

    accuracy: float
    recall: float
    precision: float
    specificity: float
    balanced_accuracy: float


class PredictiveValues(NamedTuple):
    """Of the images that were found, those of class 1 (PPV); of those left alone, class 0 (NPV). NaN for 0 of 0."""

    positive: float
    negative: float


def rates(labels: NDArray[np.integer], scores: NDArray[np.floating], threshold: float = 0.5) -> Rates:
    """Rates of a classifier that takes everything from ``threshold`` on for class 1.

    Args:
        labels: ``(images,)``, 0 or 1.
        scores: ``(images,)``, of class 1; probabilities, or any other scale that the threshold is on.
        threshold: Lowest score that is taken for class 1.

    Returns:
        The rates; recall, precision or specificity is NaN when nothing is of class 1, taken for it, or of class 0.

    Raises:
        UserError: If there are no images, the shapes differ, a label is not 0 or 1, or a score is NaN.
    """
    if labels.ndim != 1 or labels.shape != scores.shape or not labels.size:
        raise UserError(f"labels have shape {labels.shape} and scores {scores.shape}; give one of both an image")
    if not np.isin(labels, (0, 1)).all():
        raise UserError(f"labels are {np.unique(labels)[:5].tolist()}; give 0 and 1, the class to be found")
    if np.isnan(scores).any():
        raise UserError("some scores are not a number; give those of a run that did not diverge")
    truth, found = labels == 1, scores >= threshold
    recall, specificity = _share(found[truth]), _share(~found[~truth])
    return Rates(
        accuracy=_share(found == truth),
        recall=recall,
        precision=_share(truth[found]),
        specificity=specificity,
        balanced_accuracy=(recall + specificity) / 2,
    )


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> PredictiveValues:
    """What a finding means among people of whom a share of ``prevalence`` is ill (Bayes' rule).

    With sensitivity Se, specificity Sp and prevalence pi: PPV = Se pi / (Se pi + (1 - Sp) (1 - pi)) and
    NPV = Sp (1 - pi) / (Sp (1 - pi) + (1 - Se) pi). Image sets often hold more of a rare disease than those
    have who will be examined; the precision that was measured on them holds for the set alone.

    Args:
        sensitivity: Recall of class 1, in [0, 1].
        specificity: Recall of class 0, in [0, 1].
        prevalence: Share of class 1 where the classifier will be used, in [0, 1].

    Returns:
        Both values in [0, 1]; NaN when nothing would be found, or nothing left alone, or a rate is NaN.

    Raises:
        UserError: If a share is outside [0, 1].
    """
    shares = {"sensitivity": sensitivity, "specificity": specificity, "prevalence": prevalence}
    for name, value in shares.items():
        if value < 0 or value > 1:
            raise UserError(f"{name} is {value}; give a share in [0, 1] (1 % is 0.01)")
    ill_found, healthy_found = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    healthy_left, ill_left = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    return PredictiveValues(_ratio(ill_found, ill_found + healthy_found), _ratio(healthy_left, healthy_left + ill_left))


def _share(hits: NDArray[np.bool_]) -> float:
    return _ratio(float(hits.sum()), float(hits.size))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
