"""Calibration: whether a classifier is right as often as it says, and one number that makes it so."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_automl.metrics.predictions import Labels, Scores, check_predictions
from lightning_automl.rundir import UserError

#: Temperatures that ``fit_temperature`` looks at.
TEMPERATURES = (0.1, 10.0)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Images in bins of confidence, the probability of the predicted class; every field is ``(bins,)``.

    Attributes:
        lower: Smallest confidence that falls into the bin.
        upper: Confidence at which the next bin begins; the last bin contains its own.
        confidence: Mean confidence; NaN in an empty bin.
        accuracy: Share of right predictions; NaN in an empty bin.
        counts: Number of images.
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    counts: NDArray[np.int64]


def reliability(probabilities: Scores, labels: Labels, bins: int = 15, equal_mass: bool = False) -> Reliability:
    """Sort images into bins by the probability of their predicted class.

    Guo, Pleiss, Sun and Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017,
    https://arxiv.org/abs/1706.04599 (section 2), but for one detail: bins contain their lower edge and not their upper
    one, as in torchmetrics. Bins of equal mass are those of Nixon et al., *Measuring Calibration in Deep Learning*,
    2019, https://arxiv.org/abs/1904.01685 (adaptive calibration error), for the predicted class alone.

    Args:
        probabilities: ``(images, classes)`` in [0, 1]; of equally probable classes the first one is predicted.
        labels: ``(images,)``, in [0, classes).
        bins: Number of bins, 1 or more.
        equal_mass: Bins of as many images each, rather than of equal width in [0, 1]. Images of the same confidence
            stay together, so that the result does not depend on the order of the images, and there may be fewer bins.

    Returns:
        The table.

    Raises:
        UserError: If there are no images, the shapes differ, a label is no class, a probability is not in [0, 1] or
            ``bins`` is below 1.
    """
    check_predictions(probabilities, labels)
    if bins < 1:
        raise UserError(f"bins is {bins}; give 1 or more")
    predicted = probabilities.argmax(1)
    confidence = probabilities[np.arange(len(labels)), predicted].astype(np.float64)
    # Of floats that sum to one, the largest may be above one by a rounding.
    if confidence.min() < 0 or confidence.max() > 1 + 1e-5:
        raise UserError("probabilities are outside [0, 1]; give the softmax of the logits")
    if equal_mass:
        cuts = np.arange(bins) * len(labels) // bins
        lower = np.unique(np.sort(confidence)[cuts])
        upper = np.append(lower[1:], confidence.max())
    else:
        edges = np.linspace(0, 1, bins + 1)
        lower, upper = edges[:-1], edges[1:]
    index = np.searchsorted(lower, confidence, side="right") - 1
    counts = np.bincount(index, minlength=len(lower))
    divisor = np.where(counts > 0, counts, np.nan)
    return Reliability(
        lower,
        upper,
        np.bincount(index, weights=confidence, minlength=len(lower)) / divisor,
        np.bincount(index, weights=predicted == labels, minlength=len(lower)) / divisor,
        counts,
    )


def expected_calibration_error(table: Reliability) -> float:
    """Mean distance between confidence and accuracy over the bins of a table, weighted by their images; in [0, 1].

    Guo et al. 2017, https://arxiv.org/abs/1706.04599 (equation 3). On few images it is biased upwards: a perfectly
    calibrated classifier has more than 0, the more so the more bins there are.
    """
    filled = table.counts > 0
    gaps = np.abs(table.accuracy[filled] - table.confidence[filled])
    return float((gaps * table.counts[filled]).sum() / table.counts.sum())


def fit_temperature(logits: Scores, labels: Labels) -> float:
    """The number by which to divide logits so that their softmax fits the labels best.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599 (section 4.2): it minimises the mean negative log-likelihood of
    the validation split. The predicted classes stay the same, and so do all scores that need only them.

    Searched are temperatures in [0.1, 10] (``TEMPERATURES``) and exactly 1, which is the answer when nothing is better,
    so that the likelihood of the split it is fitted on never gets worse. One departure from the paper: when every image
    is classified correctly, the likelihood has no maximum but rises on and on as the temperature falls to zero, which
    says nothing about how often the classifier will err elsewhere; then temperatures below 1 are not looked at.

    Args:
        logits: ``(images, classes)``, finite. Logarithms of probabilities will do.
        labels: ``(images,)``, in [0, classes).

    Returns:
        The temperature, above 1 for a classifier that was too sure of itself.

    Raises:
        UserError: If there are no images, the shapes differ, a label is no class or a logit is not finite.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    check_predictions(logits, labels, "logits")
    scores = np.asarray(logits, np.float64)
    # Only the distance to the own class's logit matters; subtracted first, large logits lose no digits.
    margins = scores - scores[np.arange(len(labels)), labels][:, None]

    def loss(logarithm: float) -> float:
        return float(logsumexp(margins / np.exp(logarithm), axis=1).mean())

    separated = ((margins >= 0).sum(1) == 1).all()
    low, high = np.log(1.0 if separated else TEMPERATURES[0]), np.log(TEMPERATURES[1])
    # The loss is convex in 1 / temperature, so that it has one valley over the logarithm too.
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
    return float(np.exp(found)) if loss(found) < loss(0.0) else 1.0
